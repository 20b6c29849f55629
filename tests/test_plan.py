"""The plan is a pure function: the same rows for any worker, rank and resume, each at most once in a pass."""

from __future__ import annotations

import json
import pickle
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from gve.data.plan import (
    EpochPlan,
    PassOrder,
    PlannedSource,
    PlanState,
    draw,
    hold_out,
    key_of,
    permutation,
    raw_words,
    units_of,
)
from gve.items import InputError


def source(name: str = "web", task: str = "T2V", level: int = 2, batch: int = 8, shards: tuple = (30, 7, 13, 50, 20)):
    return PlannedSource(name, task, level, batch, np.array(shards, np.int64), np.array([3, 31, 32, 119], np.int64))


SOURCES = [source(), source("news", "T2I", 1, 12), source("clips", "T2V", 2, 6, (40, 40))]
WEIGHTS = {"T2V": 0.7, "T2I": 0.3}


def plan(**changes) -> EpochPlan:
    settings = {"seed": 7, "epoch": 0, "num_steps": 60, "weights": WEIGHTS, **changes}
    return EpochPlan(settings.pop("sources", SOURCES), **settings)


def rows_of(plan: EpochPlan, first: int = 0, world: int = 1) -> list:
    return [(s, [plan.rows(s, rank, world) for rank in range(world)]) for s in range(first, plan.num_steps)]


def test_draws_are_pinned() -> None:
    # Recorded with numpy 2.4.6 and hashlib; another value means that old runs cannot be replayed.
    assert key_of(42, "task", 0) == 6671881356608832176
    assert raw_words(3, 42, "task", 0).tolist() == [14812941280464126034, 13807976815060695182, 9459263503396706731]
    assert permutation(8, 42, "shards", "web", 0).tolist() == [7, 5, 1, 0, 4, 6, 3, 2]
    # By hand from the words above: 0.803, 0.749, 0.513 of 2**64; CDF 0.2, 0.5, 1.0.
    assert draw([0.2, 0.3, 0.5], 10, 42, "task", 0).tolist() == [2, 2, 2, 2, 2, 1, 1, 2, 2, 0]
    assert raw_words(2, 42, "task", 1).tolist() != raw_words(2, 42, "task", 0).tolist()


def test_draw_follows_the_weights() -> None:
    drawn = Counter(draw([0.2, 0.0, 0.8], 20_000, 1, "x").tolist())
    # Standard error of a share of 0.2 over 20,000 draws is 0.003.
    assert drawn[0] / 20_000 == pytest.approx(0.2, abs=0.012)
    assert drawn[1] == 0
    assert set(draw([1.0, 0.0], 1000, 2, "x").tolist()) == {0}


def test_every_row_once_in_a_pass_and_windows_are_shuffled() -> None:
    one = source()
    order = PassOrder(one, seed=7, window_shards=2)
    held_out = set(one.held_out.tolist())
    starts = np.concatenate(([0], np.cumsum(one.shard_sizes)))
    passes = []
    for number in range(3):
        places = order(range(number * one.size, (number + 1) * one.size))
        assert [(p, i) for p, i, _ in places] == [(number, i) for i in range(one.size)]
        rows = [row for _, _, row in places]
        assert sorted(rows) == [row for row in range(120) if row not in held_out]
        passes.append(rows)
        # Window by window: two shards, all of their rows, and not in ascending or shard order.
        shards = [int(np.searchsorted(starts, row, side="right")) - 1 for row in rows]
        windows = [set(), set(), set()]
        seen, place = [], 0
        for window in windows:
            while place < len(rows) and (shards[place] in window or (len(window) < 2 and shards[place] not in seen)):
                window.add(shards[place])
                place += 1
            seen += window
        assert place == len(rows), "a shard's rows left their window"
        first = [row for row, shard in zip(rows, shards, strict=True) if shard in windows[0]]
        assert first != sorted(first)
        assert len({shards[i] for i in range(12)}) == 2, "the shards of a window are mixed"
    assert passes[0] != passes[1] != passes[2]
    # One window over all shards mixes them all; the same places under another seed differ.
    assert PassOrder(one, 7)(range(50)) != PassOrder(one, 8)(range(50))


def test_ranks_partition_the_global_batch() -> None:
    whole = plan()
    for step, ranks in rows_of(whole, world=2):
        everything = whole.rows(step).places
        assert ranks[0].places == everything[0::2]
        assert ranks[1].places == everything[1::2]
        assert ranks[0].seed != ranks[1].seed
    with pytest.raises(InputError, match="5 ranks"):
        whole.rows(0, 0, 5)


def test_resume_anywhere_gives_the_same_rows() -> None:
    whole = plan()
    for step in (1, 17, 59, 60):
        resumed = plan(first_step=step, cursors=whole.cursors(step))
        assert rows_of(resumed, step) == rows_of(whole, step)
        assert resumed.cursors(60) == whole.cursors(60)
    # Negative control: cursors of the epoch's start are wrong in the middle.
    assert rows_of(plan(first_step=17), 17) != rows_of(whole, 17)


def test_another_global_batch_loses_and_repeats_no_row() -> None:
    before = plan()
    cursors = before.cursors(20)
    other = [replace(s, batch=s.batch * 3) for s in SOURCES]
    after = plan(sources=other, first_step=20, cursors=cursors)
    for k, one in enumerate(SOURCES):
        places = [p for s in range(20) for p in before.rows(s).places if before.source_of[s] == k]
        places += [p for s in range(20, 60) for p in after.rows(s).places if after.source_of[s] == k]
        assert [n * one.size + i for n, i, _ in places] == list(range(len(places)))


def test_next_epoch_goes_on_where_the_last_ended() -> None:
    first = plan()
    second = plan(epoch=1, cursors=first.cursors(60))
    assert not np.array_equal(first.source_of, second.source_of)
    places = [p for e in (first, second) for s in range(60) if e.source_of[s] == 0 for p in e.rows(s).places]
    assert [n * SOURCES[0].size + i for n, i, _ in places] == list(range(len(places)))
    counts = Counter((n, row) for n, _, row in places)
    assert max(counts.values()) == 1


def test_a_longer_epoch_begins_like_a_shorter_one() -> None:
    assert rows_of(plan(num_steps=25)) == rows_of(plan(num_steps=60))[:25]


@pytest.mark.parametrize(("unit", "names"), [("task", "T2I T2V"), ("source", "clips news web"), ("level", "1 2")])
def test_units(unit: str, names: str) -> None:
    units = units_of(SOURCES, unit)
    assert sorted(units) == names.split()
    weights = dict.fromkeys(units, 1 / len(units))
    drawn = np.bincount(plan(unit=unit, weights=weights, num_steps=6000).source_of, minlength=3) / 6000
    if unit == "source":
        assert drawn == pytest.approx([1 / 3] * 3, abs=0.03)
    else:  # inside T2V and level 2: by size, 116 to 76 rows
        assert drawn == pytest.approx([0.5 * 116 / 192, 0.5, 0.5 * 76 / 192], abs=0.03)
    with pytest.raises(InputError, match="weights for"):
        plan(unit=unit, weights={"elsewhere": 1.0})


def test_a_batch_larger_than_its_source_is_refused() -> None:
    with pytest.raises(InputError, match="global batch of 117 from 116"):
        source(batch=117)


def test_hold_out_takes_copies_of_dev_pairs_along() -> None:
    rng = np.random.default_rng(0)
    index = rng.integers(0, 2**63, (200, 2)).astype(np.uint64)
    index[100:] = index[:100]  # every pair twice
    dev, held_out = hold_out(index, 12, 7, "web")
    assert len(dev) == 12
    assert set(held_out) == {row % 100 for row in dev.tolist()} | {row % 100 + 100 for row in dev.tolist()}
    assert np.array_equal(hold_out(index, 12, 7, "web")[0], dev)
    assert not np.array_equal(hold_out(index, 12, 8, "web")[0], dev)
    # Same query, other target: no copy.
    index[100:, 1] += np.uint64(1)
    assert np.array_equal(*hold_out(index, 12, 7, "web"))
    assert len(hold_out(index, 64, 7, "web")[0]) == 20, "at most a tenth"
    assert len(hold_out(index[:9], 64, 7, "web")[0]) == 0


def test_plan_survives_pickling() -> None:
    whole = plan()
    whole.rows(0)
    assert rows_of(pickle.loads(pickle.dumps(whole))) == rows_of(whole)


def test_large_plan_is_fast_and_its_state_small() -> None:
    # The published mixture has 38 sources and 13M rows.
    sources = [
        PlannedSource(f"source_number_{k:02d}", f"task{k % 13}", 2, 1024, np.full(350, 1000, np.int64))
        for k in range(38)
    ]
    weights = {f"task{k}": 1 / 13 for k in range(13)}
    started = time.perf_counter()
    large = EpochPlan(sources, seed=42, epoch=0, num_steps=100_000, weights=weights)
    assert time.perf_counter() - started < 3  # 0.3 s on the machine of the first measurement
    state = PlanState(42, cursors=large.cursors(99_999), manifest="0" * 16)
    for epoch in range(12):
        noise = permutation(38, epoch)
        units = {f"source_number_{k:02d}": round(float(noise[k]) / 777, 9) for k in range(38)}
        state = replace(
            state,
            weights={**state.weights, str(epoch): units},
            scores={**state.scores, str(epoch): {name: round(value, 6) for name, value in units.items()}},
        )
    stored = state.to_dict()
    assert len(json.dumps(stored)) < 10_000
    restored = PlanState.from_dict(json.loads(json.dumps(stored)))
    assert restored.to_dict() == stored
    assert restored.weights["11"] == state.weights["11"]
    assert restored.cursors == state.cursors
    assert sorted(stored["weights"], key=int) == [str(e) for e in range(4, 12)]


def test_state_of_other_data_is_refused() -> None:
    state = PlanState(42, manifest="a" * 16)
    state.check(42, "a" * 16)
    for seed, manifest, negatives in ((43, "a" * 16, ""), (42, "b" * 16, ""), (42, "a" * 16, "c")):
        with pytest.raises(InputError, match="checkpoint was made with other"):
            state.check(seed, manifest, negatives)
    with pytest.raises(InputError, match="another version"):
        PlanState.from_dict({"seed": 42, "page": 3})
