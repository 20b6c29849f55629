"""Checkpoints and exact resume: a run that is killed anywhere and started again ends as if it had never stopped.

Losses are compared bit for bit (CPU), rows as (source, pass, position) of every step and rank.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

import runs
from gve.callbacks import PREEMPTED, AtomicCheckpointIO, RunCheckpoints, newest_checkpoint, require_checkpoint
from gve.data.loader import Quarantine, StepBuilder, StepLoader
from gve.data.plan import EpochPlan, PlannedSource, PlanState
from gve.items import InputError


def command(recipe: Path, folder: Path, *words: Any) -> list[Any]:
    """The same words start a run and start it again."""
    given: list[Any] = ["fit", "--config", recipe, "--trainer.default_root_dir", folder, "--ckpt_path", "auto"]
    given += ["--record.steps", "true", "--trainer.logger", "false", "--uvrb.root", "null", "--data.dev_pairs", 1]
    given += ["--probe.enabled", "true", "--probe.pairs", 1, "--data.curriculum.unit", "level"]
    given += ["--data.batch_size", 2, "--trainer.limit_val_batches", 2, "--checkpoint.every_n_train_steps", 2]
    return [*given, *words]


@pytest.fixture(scope="module")
def undisturbed(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """Twelve steps of one rank, without workers."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert runs.run(command(recipe, folder / "run"), folder / "log") == [0]
    return runs.history(folder / "run")


# --------------------------------------------------------------------------------------------------------------- kills


FAULTS = [
    # (place:step:rank:signal, loader workers, where the next attempt begins). Saved are steps 2, 4, ..., the fifth of
    # an epoch's six, and the end of an epoch; "write" and "rename" strike while step 4 or 8 is saved.
    [("write:4:0:SIGKILL", 2, 2), ("probe:6:0:SIGKILL", 0, 5), ("start:8:0:SIGTERM", 3, 9)],
    [
        ("backward:1:0:SIGKILL", 3, 0),
        ("forward:3:0:SIGKILL", 0, 2),
        ("validation:6:0:SIGKILL", 2, 5),
        ("rename:8:0:SIGKILL", 0, 8),  # "last" has been renamed and "new" not yet: it is taken
        ("start:11:0:SIGUSR1", 0, 11),  # in an epoch's last step nothing is saved: it is repeated
    ],
]


@pytest.mark.timeout(500)
@pytest.mark.parametrize("faults", [FAULTS[0], pytest.param(FAULTS[1], marks=pytest.mark.slow)])
def test_stopped_anywhere_it_ends_as_if_it_had_not_been(
    faults: list[tuple[str, int, int]], undisturbed: dict[int, list[dict[str, Any]]], recipe: Path, tmp_path: Path
) -> None:
    words = command(recipe, tmp_path / "run")
    for k, (fault, workers, _) in enumerate(faults):
        again = [*words, "--data.num_workers", workers, "--trainer.callbacks+=runs.Fault"]
        expected = -signal.SIGKILL if "KILL" in fault else PREEMPTED
        assert runs.run(again, tmp_path / f"log{k}", GVE_FAULT=fault) == [expected], fault
    assert runs.run(words, tmp_path / "log") == [0]
    assert list(undisturbed) == list(range(12))
    assert runs.history(tmp_path / "run") == undisturbed
    attempts = json.loads((tmp_path / "run" / "run.json").read_text())["attempts"]
    assert [attempt["first_step"] for attempt in attempts] == [0, *(step for _, _, step in faults)]
    stopped = f"preempted: stopped by {faults[-1][0].rpartition(':')[2]}, state saved"
    assert [attempt["status"] for attempt in attempts] == ["running"] * (len(faults) - 1) + [stopped, "done"]
    assert f"{faults[-1][2]} steps done" in (tmp_path / "log.0").read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks_one_killed_then_one_preempted(recipe: Path, tmp_path: Path) -> None:
    """A rank that is killed ends the other one too. A signal to one rank ends both in good order."""
    words = [*command(recipe, tmp_path / "run"), "--data.num_workers", 2]
    fault = [*words, "--trainer.callbacks+=runs.Fault"]
    codes = runs.run(fault, tmp_path / "log0", ranks=2, GVE_FAULT="backward:3:1:SIGKILL")
    assert codes[1] == -signal.SIGKILL
    assert codes[0] not in (0, PREEMPTED)
    codes = runs.run(fault, tmp_path / "log1", ranks=2, GVE_FAULT="start:7:1:SIGUSR1")
    assert codes == [PREEMPTED, 0]
    assert runs.run(words, tmp_path / "log2", ranks=2) == [0, 0]
    attempts = json.loads((tmp_path / "run" / "run.json").read_text())["attempts"]
    assert [attempt["first_step"] for attempt in attempts] == [0, 2, 8]
    assert attempts[1]["status"] == "preempted: stopped by SIGUSR1, state saved"
    clean = command(recipe, tmp_path / "clean")
    assert runs.run(clean, tmp_path / "log3", ranks=2) == [0, 0]
    assert runs.history(tmp_path / "run", 2) == runs.history(tmp_path / "clean", 2)


def multiset(history: dict[int, list[dict[str, Any]]]) -> Counter[tuple[Any, ...]]:
    """(source, pass, position) -> how often it was trained on."""
    ranks = [rank for step in history.values() for rank in step]
    return Counter((rank["source"], *row) for rank in ranks for row in rank["rows"])


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 2), (1, 3), (2, 0), (2, 2), (2, 3)])
def test_ten_kills_at_random_moments(ranks: int, workers: int, recipe: Path, tmp_path: Path) -> None:
    """A random rank is killed -9 at a random moment, start-up included, ten times; then the run may end."""
    chance = random.Random(f"{ranks} {workers}")
    sizes = ("--trainer.max_epochs", 4, "--data.steps_per_epoch", 15, "--data.num_workers", workers)
    runs.run(["--version"], tmp_path / "log")  # the server that processes are forked from needs seconds to start
    began = time.monotonic()
    clean = command(recipe, tmp_path / "clean", *sizes)
    assert runs.run(clean, tmp_path / "log", ranks=ranks, seconds=600) == [0] * ranks
    duration = time.monotonic() - began
    expected = runs.history(tmp_path / "clean", ranks)
    words = command(recipe, tmp_path / "run", *sizes)
    kills = 0
    reached = []
    while kills < 10:
        processes = runs.start(words, tmp_path / f"log{kills}", ranks=ranks)
        victim = chance.choice(processes)
        victim.join(chance.uniform(0.1, 0.7) * duration)
        killed = victim.is_alive()
        victim.kill()
        codes = runs.wait(processes, 120)
        assert killed or codes == [0] * ranks
        kills += killed
        if (tmp_path / "run" / "run.json").is_file():
            reached.append(json.loads((tmp_path / "run" / "run.json").read_text())["attempts"][-1]["first_step"])
        if not killed:  # it has ended: the rest of the kills hit a new run
            assert runs.history(tmp_path / "run", ranks) == expected
            (tmp_path / "run").rename(tmp_path / f"ended{len(reached)}")
    assert runs.run(words, tmp_path / "last", ranks=ranks, seconds=600) == [0] * ranks
    found = runs.history(tmp_path / "run", ranks)
    print(
        f"ranks {ranks}, workers {workers}: 10 kills, attempts began at steps {reached}, undisturbed {duration:.0f} s"
    )
    assert multiset(found) == multiset(expected)
    assert found == expected


# --------------------------------------------------------------------------------------------------------- checkpoints


class Scored(BoringModel):
    """Logs a given val/loss in each epoch."""

    def __init__(self, losses: list[float]) -> None:
        super().__init__()
        self.losses = losses

    def on_validation_epoch_end(self) -> None:
        self.log("val/loss", self.losses[self.current_epoch])


class Saves(AtomicCheckpointIO):
    """Notes (step, completed epochs) of what is written."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int]] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        checkpoint["gve"] = {}
        progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
        self.steps.append((checkpoint["global_step"], progress["processed"]))
        super().save_checkpoint(checkpoint, path, storage_options)


def boring(
    folder: Path, losses: list[float], saves: Saves, every: int = 3, path: Path | None = None, minutes: float = 0.0
) -> None:
    trainer = L.Trainer(
        default_root_dir=folder,
        max_epochs=len(losses),
        limit_train_batches=8,
        limit_val_batches=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[saves],
        callbacks=[RunCheckpoints(str(folder / "checkpoints"), every_n_train_steps=every, every_n_minutes=minutes)],
    )
    trainer.fit(Scored(losses), ckpt_path=path, weights_only=True)


def step_of(path: Path) -> int:
    return int(torch.load(path, weights_only=True)["global_step"])


def test_when_and_what_is_saved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every third step, before the last of an epoch's eight steps, never at it, and when the epoch is over."""
    saves = Saves()
    folder = tmp_path / "checkpoints"
    boring(tmp_path, [0.5, float("nan"), 0.3, 0.4], saves)
    ends = [(8, 1), (16, 2), (24, 3), (32, 4)]
    inside = [*((s, 0) for s in (3, 6, 7)), *((s, 1) for s in (9, 12, 15)), *((s, 2) for s in (18, 21, 23))]
    assert saves.steps == sorted([*ends, *inside, *((s, 3) for s in (27, 30, 31))])
    assert {path.name for path in folder.iterdir()} == {"last.ckpt", "previous.ckpt", "best.ckpt"}
    assert [step_of(folder / f"{name}.ckpt") for name in ("last", "previous", "best")] == [32, 31, 24]
    # Killed after an epoch's state was saved and before it was named the best: the next attempt names it.
    os.replace(folder / "previous.ckpt", folder / "best.ckpt")
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    checkpoint["callbacks"]["RunCheckpoints"]["best_step"] = 32
    torch.save(checkpoint, folder / "last.ckpt")
    boring(tmp_path, [0.5, 0.6, 0.3, 0.4, 0.9], Saves(), path=folder / "last.ckpt")
    assert step_of(folder / "best.ckpt") == 32
    assert step_of(folder / "last.ckpt") == 40
    # A new run in the old folder: what it resumes from can only be its own.
    boring(tmp_path, [0.9], Saves())
    assert step_of(folder / "last.ckpt") == step_of(folder / "best.ckpt") == 8
    assert step_of(tmp_path / "checkpoints-1" / "last.ckpt") == 40


def test_a_save_is_due_by_the_clock_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute passes with each look at the clock: one at each step and one at each save.

    So of an epoch's eight steps (last of all before its last one), five minutes after a save the next one is due: the
    clock is read at the start (0), at steps 1 to 5 (1 to 5: due) and at the save (6); 7 and 8 at steps 6 and 7, the
    save before the last step.
    """
    minutes = iter(range(1000))
    monkeypatch.setattr("gve.callbacks.checkpoint.time.monotonic", lambda: 60.0 * next(minutes))
    saves = Saves()
    boring(tmp_path, [0.5], saves, every=0, minutes=5.0)
    assert saves.steps == [(5, 0), (7, 0), (8, 1)]
    saves = Saves()
    boring(tmp_path / "off", [0.5], saves, every=0, minutes=0.0)
    assert saves.steps == [(7, 0), (8, 1)]
    with pytest.raises(InputError, match=r"every_n_minutes=-1"):
        RunCheckpoints(str(tmp_path), every_n_minutes=-1)


def test_the_benchmark_chooses_no_weights(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="on the benchmark"):
        RunCheckpoints(str(tmp_path), monitor="uvrb/ability/AVG-A")


def test_the_newest_whole_checkpoint_is_found(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "none") is None
    for name in ("best", "previous", "last"):
        torch.save({"gve": {}, "weights": torch.arange(4096.0)}, tmp_path / f"{name}.ckpt")
    (tmp_path / "last.ckpt.tmp").write_bytes(b"half")
    assert newest_checkpoint(tmp_path) == tmp_path / "last.ckpt"
    # One flipped bit inside the weights: torch itself reads on.
    whole = (tmp_path / "last.ckpt").read_bytes()
    place = whole.index(torch.arange(4096.0).numpy().tobytes()[:64]) + 1000
    (tmp_path / "last.ckpt").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    assert not torch.equal(torch.load(tmp_path / "last.ckpt", weights_only=True)["weights"], torch.arange(4096.0))
    with pytest.raises(InputError, match="is damaged: the checksum of"):
        require_checkpoint(tmp_path / "last.ckpt")
    with pytest.warns(UserWarning, match=r"last.ckpt is damaged.*the one before it is tried"):
        assert newest_checkpoint(tmp_path) == tmp_path / "previous.ckpt"
    # Cut off, as a disk that ran full leaves it.
    os.truncate(tmp_path / "previous.ckpt", 5000)
    with pytest.warns(UserWarning, match="previous.ckpt is no checkpoint"):
        assert newest_checkpoint(tmp_path) == tmp_path / "best.ckpt"
    # Training for days must not begin anew in silence.
    (tmp_path / "best.ckpt").write_bytes(b"")
    with pytest.warns(UserWarning, match="is tried"), pytest.raises(InputError, match=r"no checkpoint in .* is whole"):
        newest_checkpoint(tmp_path)
    (tmp_path / "new.ckpt").mkdir()
    with pytest.raises(InputError, match="sharded"):
        newest_checkpoint(tmp_path)


# --------------------------------------------------------------------------------------------------- far into a run


class Counting:
    """Stands for a StepBuilder: notes the rows that it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.quarantine, self.in_flight = Quarantine(folder), torch.zeros(1, 3, dtype=torch.int64)
        self.rows: list[Any] = []

    def __call__(self, rows: Any) -> Any:
        self.rows.append(rows)
        return rows


def far_plan(state: PlanState | None = None) -> EpochPlan:
    """38 sources in 1,000 shards, 12.6 million rows; epochs of 120,000 steps."""
    rows = np.random.default_rng(0)
    sources = [
        PlannedSource(f"source{k:02}", f"task{k % 13}", k % 3, 1024, rows.integers(10_000, 15_000, 26 + (k < 12)))
        for k in range(38)
    ]
    assert sum(len(source.shard_sizes) for source in sources) == 1000
    state = state or PlanState(7)
    weights = {f"task{k}": 1 / 13 for k in range(13)}
    return EpochPlan(
        sources,
        seed=7,
        epoch=state.epoch,
        num_steps=120_000,
        weights=weights,
        first_step=state.step,
        cursors=state.cursors,
    )


def test_a_resume_at_step_100_000_takes_seconds_and_reads_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = far_plan()
    state = PlanState(7, step=100_000, cursors=whole.cursors(100_000))
    text = json.dumps(state.to_dict())
    assert len(text) < 10_000
    build = Counting(tmp_path)
    monkeypatch.setattr(Quarantine, "account", lambda *_: None)
    began = time.perf_counter()
    again = PlanState.from_dict(json.loads(text))
    loader = StepLoader(lambda: far_plan(again), cast(StepBuilder, build), 120_000, num_workers=0)
    stream: Iterator[Any] = iter(loader)
    first = [next(stream) for _ in range(3)]
    seconds = time.perf_counter() - began
    print(f"first batch after a resume at step 100,000: {seconds:.2f} s")
    assert seconds < 10
    assert [rows.step for rows in build.rows] == [100_000, 100_001, 100_002]
    assert first == [whole.rows(step) for step in range(100_000, 100_003)]
