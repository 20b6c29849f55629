"""The captioner: its prompt, its positions, and that caches, batches and company change no answer."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from gve.inputs import Prepared
from gve.items import InputError, Item
from gve.model.backbone import Backbone
from gve.toy import base, lessons
from gve.toy.base import EMBEDDED, write_base
from gve.toy.captioner import POLICY, Captioner
from gve.toy.families import Maker
from gve.toy.lessons import REQUESTS
from gve.toy.render import Shot, Still, render

QUESTION = "What does the red ring do?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("captioner") / "base"
    write_base(folder, [*REQUESTS.values(), QUESTION], seed=3)
    return folder


@pytest.fixture(scope="module")
def captioner(folder: Path) -> Captioner:
    return Captioner.from_base(folder, batch_size=4)


@pytest.fixture(scope="module")
def items() -> list[Item]:
    """Two pictures, three clips and a text."""
    make = Maker("captioner")
    scenes = [lessons.random_scene(make) for _ in range(5)]
    seen = [Item.of(image=render(Still(scene, 15))) for scene in scenes[:2]]
    seen += [Item.of(video=render(Shot((scene,)))) for scene in scenes[2:]]
    return [*seen, Item.of("There is a red ring.")]


def recomputed(captioner: Captioner, prepared: Prepared, count: int, shift: int = 0) -> list[int]:
    """Greedy tokens the slow way: no cache, no batch, no padding; every step runs the whole sequence anew."""
    batch = captioner.builder.collate([prepared])
    features = captioner.backbone.media_features(batch)
    media = {
        kind: BaseModelOutputWithPooling(pooler_output=(features[kind, key],))
        for kind, keys in (("image", batch.image_keys), ("video", batch.video_keys))
        for key in keys
    }
    ids, told = prepared.ids, []
    for _ in range(count):
        # The released rule: text goes on one after the largest position so far.
        new = torch.arange(len(told)) + int(prepared.positions.max()) + 1 + shift
        states = captioner.backbone.model(
            input_ids=ids[None],
            position_ids=torch.cat([prepared.positions, new.expand(3, -1)], dim=1)[:, None],
            mm_encoder_outputs=media,
            use_cache=False,
        ).last_hidden_state
        told.append(int(captioner.lm_head(states[0, -1]).argmax()))
        ids = torch.cat([ids, torch.tensor(told[-1:])])
    return told


def test_cached_decoding_equals_full_recomputation(
    captioner: Captioner, items: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt is the conversation of the lessons, and a cache changes nothing; other positions do."""
    ready: list[Prepared] = []
    prepare = captioner.builder.prepare
    monkeypatch.setattr(captioner.builder, "prepare", lambda item: ready.append(prepare(item)) or ready[-1])
    picture, clip, text = items[0], items[2], items[-1]
    answers = captioner.answer([picture, clip, text], [QUESTION] * 3, max_tokens=24)
    decode = captioner.builder.tokenizer.decode
    head = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    tail = f"{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    shown = {
        0: "<|vision_start|>" + "<|image_pad|>" * 9 + "<|vision_end|>",
        1: "<|vision_start|>" + "<|video_pad|>" * 36 + "<|vision_end|>",
        2: "There is a red ring. ",
    }
    with torch.no_grad():
        for row, prepared in enumerate(ready):
            assert decode(prepared.ids) == head + shown[row] + tail
            told = recomputed(captioner, prepared, 24)
            assert decode(told, skip_special_tokens=True).strip() == answers[row]
            # Negative control: an answer that stands as far behind as time is long, as in other versions.
            shifted = recomputed(captioner, prepared, 24, shift=-4)
            assert decode(shifted, skip_special_tokens=True).strip() != answers[row]
    # Four grid steps one second apart at two positions a second: text goes on after the last, not after the width.
    end = len(ready[1].ids) - len(captioner.builder.tokenizer(tail)["input_ids"])
    assert ready[1].positions[:, end - 1].tolist() == [int(ready[1].positions[0, : end - 1].max()) + 1] * 3


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_company_changes_no_answer(
    captioner: Captioner, items: list[Item], temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of different lengths, pads and ends gives what each item gives alone."""
    monkeypatch.setattr(captioner, "_stops", set(range(0, 768, 20)))  # random weights: rows end at different times
    questions = [QUESTION, "What?", *list(REQUESTS.values())[:4]]
    settings = {"max_tokens": 30, "temperature": temperature, "seed": 5}
    together = captioner.answer(items, questions, **settings)
    alone = [captioner.answer([i], [q], **settings)[0] for i, q in zip(items, questions, strict=True)]
    assert together == alone
    assert len({len(answer) for answer in together}) > 3
    if temperature:
        assert captioner.answer(items, questions, **{**settings, "seed": 6}) != together
    else:
        assert captioner.answer(items, questions, max_tokens=30, temperature=1e-5) == together


class Script(torch.nn.Module):
    """An LM head that says given tokens, one a step."""

    def __init__(self, tokens: list[int], size: int) -> None:
        super().__init__()
        self.tokens, self.size, self.step = tokens, size, 0

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        self.step += 1
        spoken = torch.tensor(self.tokens[self.step - 1]).expand(len(states))
        return torch.nn.functional.one_hot(spoken, self.size)


def test_an_answer_ends_at_im_end_or_at_the_limit(
    captioner: Captioner, items: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = captioner.builder.tokenizer
    tokens = tokenizer(" hops left<|im_end|> and more")["input_ids"]
    size = captioner.backbone.model.config.text_config.vocab_size
    words = tokens.index(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    assert words >= 2
    for limit, expected, steps in ((50, "hops left", words + 1), (words, "hops left", words), (1, None, 1)):
        script = Script(tokens, size)
        monkeypatch.setattr(captioner, "lm_head", script)
        answer = captioner.answer(items[:1], [QUESTION], max_tokens=limit)
        assert answer == [expected or tokenizer.decode(tokens[:1]).strip()]
        assert script.step == steps


def test_captions_ask_for_their_kind(captioner: Captioner, items: list[Item], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked, by kind; and the tower runs once for a clip that is asked for two kinds."""
    towers: list[int] = []
    hook = captioner.backbone.model.visual.register_forward_hook(lambda *args: towers.append(1))
    fresh = Item.of(video=render(Shot((lessons.random_scene(Maker("fresh")),))))
    captioner.caption([fresh], "theme", max_tokens=1)
    captioner.caption([fresh], "short", max_tokens=1)
    hook.remove()
    assert len(towers) == 1
    monkeypatch.setattr(captioner, "answer", lambda items, questions, **decoding: [*questions, str(decoding)])
    assert captioner.caption(items[1:3], seed=4) == [REQUESTS["static"], REQUESTS["detailed"], "{'seed': 4}"]
    assert captioner.caption(items[1:3], "camera") == [REQUESTS["camera"]] * 2 + ["{}"]
    with pytest.raises(InputError, match="'haiku' is unknown; kinds: short"):
        captioner.caption(items, "haiku")


def test_bad_input_is_refused(captioner: Captioner, items: list[Item], folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="1 questions for 2 items"):
        captioner.answer(items[:2], [QUESTION])
    with pytest.raises(InputError, match="max_tokens 0"):
        captioner.answer(items[:1], [QUESTION], max_tokens=0)
    with pytest.raises(InputError, match="padding_side left"):
        Captioner.from_base(folder, policy=POLICY.replace(padding_side="right"))
    (tmp_path / "base").mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(InputError, match="weights of base"):
        Captioner.from_base(tmp_path / "base")


def test_the_embedded_base_is_a_captioner(items: list[Item], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads what its lessons show by default, and a damaged file is not loaded."""
    embedded = Captioner.from_base()
    assert embedded.builder.policy == POLICY
    assert embedded.backbone.base_hash == Backbone.from_pretrained(str(EMBEDDED), lora=None).base_hash
    damaged = tmp_path / "weights"
    shutil.copytree(EMBEDDED, damaged)
    (damaged / "config.json").write_text("{}")
    monkeypatch.setattr(base, "EMBEDDED", damaged)
    with pytest.raises(InputError, match=r"config\.json is not the file"):
        Captioner.from_base()
