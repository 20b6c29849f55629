"""The model half of `gve bench`: the ways of a step agree, the meters tell what they should, limits are refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from gve.bench import accelerator, loss, step
from gve.bench.measure import Contest, Gauge, Options, UnequalError, hold, largest_difference
from gve.items import InputError
from gve.model.gradcache import embed_groups, groups_of

SMALL = replace(step.LOADS["tiny"], pairs=6, chunk_tokens=192)


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Options:
    monkeypatch.setitem(step.LOADS, "tiny", SMALL)
    return Options(tmp_path, rounds=1)


def config() -> Any:
    return transformers.Qwen2_5_VLConfig.from_json_file(step.BASES["tiny"])


def steps(load: step.Load, other: str) -> tuple[step.Step, step.Step]:
    cached = other == "sentence"
    module = step.embedder(step.BASES["tiny"], "float32", chunk_tokens=load.chunk_tokens if cached else 0)
    batch = step.train_batch(config(), load)
    if cached:
        return step.our_step(module, batch, "float32"), step.sentence_step(
            config(), module.backbone, batch, "float32", load.chunk_tokens
        )
    return step.our_step(module, batch, "float32"), step.transformers_step(config(), module.backbone, batch, "float32")


@pytest.mark.parametrize("other", ["transformers", "sentence"])
def test_the_stock_ways_give_our_loss_and_gradient(other: str) -> None:
    """Stock classes compute positions, mask and loss themselves; after a step of AdamW they still agree."""
    ours, theirs = steps(SMALL, other)
    for _ in range(2):
        a, b = ours(), theirs()
        assert a["gradient"].abs().max() > 0.01
        assert largest_difference(a, b) < 1e-5


def test_another_rule_of_positions_would_be_seen() -> None:
    """Negative control: with the released rule, text after a clip stands elsewhere than in the stock model."""
    module = step.embedder(step.BASES["tiny"], "float32")
    batch = step.train_batch(config(), SMALL)
    theirs = step.transformers_step(config(), module.backbone, batch, "float32")
    moved = batch.target.position_ids.clone()
    moved[:, :, -4:] += 3
    ours = step.our_step(module, replace(batch, target=replace(batch.target, position_ids=moved)), "float32")
    assert largest_difference(ours(), theirs()) > 1e-3


def test_contests_are_held(options: Options) -> None:
    """The frame compares before it times, and refuses another loss."""
    trials = list(step.trials(options))
    ways = [set(trial.contestants) for trial in trials if isinstance(trial, Contest)]
    assert {"gve", "transformers"} in ways
    assert {"gve", "sentence-transformers"} in ways
    first = trials[0]
    assert isinstance(first, Contest)
    record = hold(first, 1)
    assert record["difference"] < first.tolerance
    assert record["ratios"][0]["aim"] == 2.0
    assert 0 < record["setting"]["padding_if_each_side_is_one_batch"] < 0.7
    other = next(iter(step.trials(options)))
    assert isinstance(other, Contest)
    theirs = other.contestants["transformers"]
    wrong = {**other.contestants, "transformers": lambda: {k: 1.01 * v for k, v in theirs().items()}}
    with pytest.raises(UnequalError):
        hold(replace(other, contestants=wrong), 1)


def test_groups_by_length_change_nothing_but_the_padding() -> None:
    """Rows run with their like: same embeddings in the order of the rows, at most a sixteenth of padding each."""
    module = step.embedder(step.BASES["tiny"], "float32")
    batch = step.train_batch(config(), replace(SMALL, pairs=12))
    sides = [batch.query, batch.target]
    features = module.backbone.media_features(*sides)
    groups = groups_of(sides, 1 / 16)
    assert len(groups) > 2
    for number, side in enumerate(sides):
        tokens = int(side.attention_mask.sum())
        own = [group for group in groups if group.side == number]
        assert sorted(int(row) for group in own for row in group.rows) == list(range(12))
        for group in own:
            mask = group.batch.attention_mask
            assert mask.numel() - int(mask.sum()) <= tokens / 16
    with torch.no_grad():
        rows = embed_groups(lambda side: module.backbone(side, features), groups)
        whole = [module.backbone(side, features) for side in sides]
    assert largest_difference(rows, whole) < 1e-5
    # Negative control: groups in another order than the rows.
    assert largest_difference([rows[0].flip(0), rows[1]], whole) > 0.01
    assert len(groups_of(sides, float("inf"))) == 2


def test_flops_of_a_3b_step_by_hand() -> None:
    """One pair of 3B, 125 and 825 tokens: twice the layers' parameters per token; LoRA and scores are the rest."""
    load = replace(accelerator.LOADS["3b"], pairs=1)
    query, target = 125, 16 + 800 + 9
    assert (load.text_tokens[0] + step.TEMPLATE, 800) == (query, 4 * 20 * 40 // 4)
    sizes = accelerator.Architecture.of(str(step.BASES["3b"]))
    how = accelerator.Training(checkpointing=False)
    rows = [accelerator.Sequences(1, query), accelerator.Sequences(1, target)]
    parts = accelerator.step_flops(sizes, rows, [accelerator.Pictures(1, (4, 20, 40))], how)
    # A layer of 3B: q and o 2048 x 2048, k and v 2048 x 256, MLP three times 2048 x 11008; 36 layers, and the last MLP
    # on the pooled token only.
    attention, mlp = 2 * 2048 * 2048 + 2 * 2048 * 256, 3 * 2048 * 11008
    tokens = query + target
    linear = 2 * (tokens * (36 * attention + 35 * mlp) + 2 * mlp)
    assert linear == pytest.approx(parts["forward"], rel=0.03)  # LoRA and attention scores are the rest
    assert linear < parts["forward"]
    tower = 32 * (4 * 1280**2 + 3 * 1280 * 3420) * 2 * 3200
    assert tower == pytest.approx(parts["tower"], rel=0.1)
    needed = accelerator.total(parts)
    assert accelerator.utilisation(needed, 0.05, 989e12) == pytest.approx(needed / (0.05 * 989e12))


def _cpu_attention(q: Any, k: Any, v: Any, dropout: float = 0.0, causal: bool = False, *_: Any, **__: Any) -> int:
    batch, heads, length, width = q
    return 4 * batch * heads * length * k[2] * width // (2 if causal else 1)


def _cpu_attention_backward(
    towards: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, p: float, causal: bool, **__: Any
) -> int:
    return _cpu_attention(q, k, v, p, causal) * 5 // 2


def counted(work: Callable[[], Any]) -> int:
    """Operations that torch counts. It has no formula of the CPU's attention: half of the scores where it is causal."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    own = {attention: _cpu_attention, backward: _cpu_attention_backward}
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        work()
    return counter.get_total_flops()


def test_meters_of_a_rig(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flops are those that torch counts; a forced LM head lowers the utilisation, random lengths raise the padding."""
    load = replace(accelerator.LOADS["tiny"], pairs=3)
    rig = accelerator.Rig("tiny", "cpu", load, checkpointing=False)
    needed, done = rig.flops(), counted(rig.train_step)
    loss_flops = 3 * 2 * 2 * 3 * 3 * rig.sizes.hidden  # two products of 3 x 3 cosines, forward and back
    assert done == pytest.approx(needed + loss_flops, rel=1e-6)
    assert rig.flops(hardware=True) == needed
    peak = 1e9
    plain = accelerator.utilisation(needed, done / peak, peak)
    assert plain == pytest.approx(1, abs=1e-3)

    checkpointed = accelerator.Rig("tiny", "cpu", load, checkpointing=True)
    assert checkpointed.flops() == needed
    assert checkpointed.flops(hardware=True) > 1.15 * needed

    head = torch.randn(rig.sizes.vocab, rig.sizes.hidden)
    final = rig.module.backbone.model.language_model.norm
    handle = final.register_forward_hook(lambda module, args, states: (states @ head.T, states)[1])
    with_head = counted(rig.train_step)
    handle.remove()
    assert accelerator.utilisation(needed, with_head / peak, peak) < 0.97 * plain

    assert rig.shares()["padding"] == 0
    ragged = accelerator.Rig("tiny", "cpu", replace(load, text_tokens=(4, 90), pairs=8))
    shares = ragged.shares()
    assert 0 < shares["padding"] < 0.1
    monkeypatch.setattr("gve.model.embedder.GROUP_PADDING", float("inf"))
    assert 0.2 < ragged.shares()["padding"] < 0.6
    assert 0.5 < shares["tower"] + shares["decoder"] + shares["loss"] <= 1


def test_the_accelerator_path_on_a_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every meter of `--size tiny --device cpu` gives a number, and no aim is set where no data sheet is."""
    monkeypatch.setitem(accelerator.LOADS, "tiny", replace(accelerator.LOADS["tiny"], pairs=2))
    monkeypatch.setitem(accelerator.MOST_PAIRS, "tiny", 2)
    found = {}
    for trial in accelerator.trials(Options(tmp_path, rounds=1, size="tiny", device="cpu")):
        assert isinstance(trial, Gauge)
        record = hold(trial, 1)
        assert record["met"] is None
        found[record["what"]] = record["value"]["median"]
    assert found["training, tiny"] > 0
    assert found["encoding clips, tiny"] > 0
    assert 0 < found["training, model FLOPs utilisation, tiny"] < 1
    largest = [value for name, value in found.items() if name.startswith("largest batch")]
    assert largest == [2, 2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused only without a GPU")
@pytest.mark.parametrize("size", ["3b", "7b"])
def test_large_sizes_need_a_gpu(size: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs a CUDA device") as error:
        next(iter(accelerator.trials(Options(tmp_path, size=size))))
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=re.escape("tiny, mid")):
        next(iter(step.trials(Options(tmp_path, size=size))))


def test_out_of_memory_ends_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five pairs fit: doubling finds four; without room it finds none, and it ends at the largest asked for."""
    monkeypatch.setitem(accelerator.MOST_PAIRS, "tiny", 8)

    class Full:
        def __init__(self, size: str, device: str, load: step.Load, **_: Any) -> None:
            self.pairs = load.pairs

        def train_step(self) -> float:
            if self.pairs > room:
                raise torch.OutOfMemoryError("no room")
            return 0.0

    monkeypatch.setattr(accelerator, "Rig", Full)
    found = []
    for room in (5, 0, 10_000):  # noqa: B007  # read by train_step
        found.append(accelerator.largest_batch("tiny", "cpu", accelerator.LOADS["tiny"], cached=False))
    assert found == [4, 0, 8]


def test_the_loss_equals_the_full_matrix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(loss.PAIRS, "tiny", (600, 1200))
    race = next(iter(loss.trials(Options(tmp_path, rounds=1))))
    assert isinstance(race, Contest)
    record = hold(race, 1)
    assert 0 <= record["difference"] < race.tolerance
    given = loss.rows(600)
    values = [torch.autograd.grad(way(*given), given)[0] * 600 for way in (loss.tiled, loss.full)]
    assert values[0].abs().max() > 1
    assert largest_difference(values[0], -values[1]) > race.tolerance  # negative control


@pytest.mark.slow
def test_memory_of_the_tiled_loss() -> None:
    """8,192 pairs: the matrix alone would be 256 MiB; with its softmax and gradient some 1 GiB."""
    assert loss.beyond_inputs(8192) < 8192 * loss.BYTES_PER_PAIR
    assert loss.beyond_inputs(8192, tile=8191) > 8192 * loss.BYTES_PER_PAIR
