"""Lessons and pretraining of the tiny base: true answers, nothing held out or tested, exact continuation."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch

from gve.inputs import InputBuilder, InputPolicy, VisionGeometry
from gve.items import Frames, InputError, Item
from gve.toy import lessons, pretraining
from gve.toy.base import EMBEDDED, random_base, tiny_config
from gve.toy.captions import Teller
from gve.toy.families import Maker, is_held_out
from gve.toy.forms import holds
from gve.toy.language import DIALECTS
from gve.toy.pretraining import Lessons, Muon, Recipe, Stage, answer_logits, measure, pretrain
from gve.toy.render import draw
from gve.toy.scenes import SAMPLED_FRAMES
from gve.video import Sampling

TINY = Recipe(steps=6, batch=2, stages=(Stage(0.5, 1, 1, 1), Stage(1.0, 1, 1, 1, captions=1.0)))


@pytest.fixture(scope="module")
def builder() -> InputBuilder:
    policy = InputPolicy(sampling=Sampling.uniform(8), max_frame_tokens=9, max_image_tokens=9, append_eos=False)
    return InputBuilder.from_base(str(EMBEDDED), policy)


@pytest.fixture(scope="module")
def taught(builder: InputBuilder) -> Lessons:
    return Lessons(builder.tokenizer, builder.geometry, Recipe(), refuse=lambda clip: False)


@pytest.mark.parametrize("dialect", ["A", "B"])
def test_every_answer_is_true_of_its_scene(dialect: str) -> None:
    make, teller = Maker("true", dialect), Teller(DIALECTS[dialect], random.Random(0))
    kinds = set()
    for _ in range(300):
        scene = lessons.random_scene(make)
        assert not is_held_out((scene,))
        for turn in (
            *lessons.still_turns(scene, teller),
            *lessons.moving_turns(scene, teller),
            *lessons.caption_turns(scene, teller, True),
            *lessons.caption_turns(scene, teller, False),
        ):
            assert holds(turn.form, scene), turn
            kinds.add(turn.kind)
    assert kinds == {
        *("colour", "shape", "size", "place", "relation", "count", "ground"),
        *("move", "order", "camera", "list", "caption"),
    }


def test_a_lesson_reads_as_the_input_builder_writes_a_question(taught: Lessons, builder: InputBuilder) -> None:
    """Same ids and positions up to the first answer: what is learned is what the embedder will read."""
    batch = taught.batch("parity", 8, Stage(1, 0, 1, 0))
    text = builder.tokenizer.decode(batch.input_ids[0].tolist())
    question = text.split("<|vision_end|>")[1].split("<|im_end|>")[0]
    frames = Frames(
        *(torch.zeros(8, 84, 84, 3, dtype=torch.uint8).numpy(), torch.arange(8).numpy() * 0.5),
        *(torch.tensor(SAMPLED_FRAMES).numpy(), 32, 8.0),
    )
    prepared = builder.prepare(Item.of(question, video=frames))
    length = len(prepared.ids)
    assert torch.equal(batch.input_ids[0, :length], prepared.ids)
    assert torch.equal(batch.position_ids[:, 0, :length], prepared.positions)
    assert batch.turn[0, :length].sum() == 0
    assert batch.turn[0, length] == 1
    # The positions go on by one after the answer.
    assert torch.equal(batch.position_ids[:, 0, length], prepared.positions[:, -1] + 1)


def test_lessons_are_a_function_of_seed_and_step(taught: Lessons, builder: InputBuilder) -> None:
    one, again, other = (taught.batch(step, 3, TINY.stages[0]) for step in (5, 5, 6))
    assert torch.equal(one.input_ids, again.input_ids)
    assert all(torch.equal(one.patches[kind], again.patches[kind]) for kind in one.patches)
    assert one.input_ids.shape != other.input_ids.shape or not torch.equal(one.input_ids, other.input_ids)


def test_refused_scenes_are_not_shown(builder: InputBuilder) -> None:
    seen = []

    def refuse(clip: tuple[object, ...]) -> bool:
        seen.append(clip)
        return len(seen) % 3 != 0  # two of three scenes are refused

    Lessons(builder.tokenizer, builder.geometry, Recipe(), refuse).batch(0, 4, Stage(1, 1, 0, 0))
    assert len(seen) == 12


def test_the_measure_counts_whole_answers(taught: Lessons, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the turns 1 .. n the second has one wrong token; the expected shares are counted by hand."""
    batch = taught.batch(0, 4, Stage(1, 1, 0, 0))
    turns = batch.turn[:, 1:][batch.turn[:, 1:] > 0]
    tokens = batch.input_ids[:, 1:][batch.turn[:, 1:] > 0]
    logits = torch.nn.functional.one_hot(tokens, 768).float() * 9
    wrong = int((turns == 2).nonzero()[0])
    logits[wrong] = logits[wrong].roll(1)
    monkeypatch.setattr(pretraining, "answer_logits", lambda model, batch: (logits, tokens, turns))
    shares = measure(random_base(tiny_config(taught.tokenizer), 0), {"still": batch})
    kind = batch.kinds[1]
    assert shares[f"still/{kind}"] == pytest.approx(1 - 1 / batch.kinds.count(kind), abs=1e-4)
    assert all(share == 1 for name, share in shares.items() if name not in ("still/loss", f"still/{kind}"))


def test_answers_depend_on_the_picture_and_the_tower_learns(taught: Lessons) -> None:
    model = random_base(tiny_config(taught.tokenizer), 0)
    batch = taught.batch(0, 2, Stage(1, 0, 1, 0))
    logits, tokens, _ = answer_logits(model, batch)
    torch.nn.functional.cross_entropy(logits, tokens).backward()
    assert model.model.visual.patch_embed.proj.weight.grad.abs().max() > 0
    black = replace(batch, patches={kind: torch.zeros_like(value) for kind, value in batch.patches.items()})
    assert (answer_logits(model, black)[0] - logits).abs().max() > 1e-3


def test_muon_makes_updates_orthogonal_as_torchs_own_does() -> None:
    """Against torch.optim.Muon, which works in bfloat16: the directions agree; plain momentum's do not."""
    torch.manual_seed(0)
    start, gradient = torch.randn(24, 48), torch.randn(24, 48) * torch.logspace(0, -1.5, 48)
    moved = {}
    for name in ("ours", "torch", "sgd"):
        weight = torch.nn.Parameter(start.clone())
        weight.grad = gradient.clone()
        optimizer = {
            "ours": lambda p: Muon(p, lr=1e-2),
            "torch": lambda p: torch.optim.Muon(p, lr=1e-2, weight_decay=0.01, nesterov=True),
            "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
        }[name]([weight])
        optimizer.step()
        moved[name] = (weight.detach() - start * (1 - 1e-4 * (name != "sgd"))).flatten()
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(moved["ours"], moved["torch"], 0) > 0.99
    assert cosine(moved["sgd"], moved["torch"], 0) < 0.95
    singular = torch.linalg.svdvals(moved["ours"].view(24, 48)) / (1e-2 * 0.2 * 48**0.5)
    assert singular.min() > 0.5
    assert singular.max() < 1.3


def test_an_interrupted_run_goes_on_exactly(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretraining, "HELD_OUT_LESSONS", 4)
    monkeypatch.setattr(pretraining, "lesson_texts", lambda: ["a red circle hops left"])

    class Builder:
        def __init__(self, *_: object) -> None: ...

        def build(self) -> list[object]:
            return []

    monkeypatch.setattr(pretraining, "Builder", Builder)
    whole = pretrain(tmp_path / "whole", TINY, save_every=3)

    stop = pretraining._step

    def interrupted(*arguments: object) -> float:
        interrupted.calls += 1
        if interrupted.calls == 5:
            raise KeyboardInterrupt
        return stop(*arguments)

    interrupted.calls = 0
    monkeypatch.setattr(pretraining, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pretrain(tmp_path / "cut", TINY, save_every=3)
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    monkeypatch.setattr(pretraining, "_step", stop)
    # Of the state's step, of one after it, and a torn one.
    (tmp_path / "cut" / "log.jsonl").write_text('{"step": 3}\n{"step": 4}\n{"st')
    cut = pretrain(tmp_path / "cut", TINY, save_every=3)
    steps = [json.loads(line)["step"] for line in (cut / "log.jsonl").read_text().splitlines()]
    assert steps == [3, 6]
    assert (cut / "SHA256SUMS").read_text() == (whole / "SHA256SUMS").read_text()
    last = [json.loads((folder / "log.jsonl").read_text().splitlines()[-1]) for folder in (whole, cut)]
    assert last[0]["step"] == last[1]["step"] == 6
    assert last[0]["clip/loss"] == last[1]["clip/loss"]
    with pytest.raises(InputError, match="another recipe"):
        pretrain(cut, replace(TINY, seed=1))


def test_a_recipe_with_an_unknown_key_is_refused() -> None:
    with pytest.raises(InputError, match="learning_rate"):
        Recipe.from_dict({"learning_rate": 1})
    with pytest.raises(InputError, match="last stage must end at 1"):
        Recipe.from_dict({"stages": [{"until": 0.5, "still": 1, "clip": 0, "text": 0}]})
    rates = [TINY.rate(step) for step in (0, 2, 5)]
    assert rates == pytest.approx([1 / 50, 3 / 50, 6 / 50])
    long = replace(TINY, steps=1000)
    assert [long.rate(step) for step in (100, 599, 800, 999)] == pytest.approx([1, 1, 0.5, 0.01])


def test_geometry_of_the_embedded_base() -> None:
    geometry = VisionGeometry.from_config(EMBEDDED)
    assert geometry.factor == 28
    assert geometry.tokens((4, 6, 6)) == 36
    assert draw(lessons.random_scene(Maker("x")), 0).shape == (84, 84, 3)
