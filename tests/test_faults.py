"""Damaged shards, dying workers: the run goes on or every rank stops with the reason; no rank hangs, no row is lost."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import runs
from gve.cli import main
from gve.data.curriculum import Curriculum
from gve.data.datamodule import PyramidDataModule
from gve.data.plan import EpochPlan
from gve.data.schema import ShardError
from gve.data.shards import OFFSET, SIZE
from gve.data.sources import Source, open_sources


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def command(recipe: Path, shards: Path, folder: Path, *words: Any) -> list[Any]:
    given: list[Any] = ["fit", "--config", recipe, "--data.root", shards, "--trainer.default_root_dir", folder]
    given += ["--ckpt_path", "auto", "--record.steps", "true", "--trainer.logger", "false", "--uvrb.root", "null"]
    given += ["--data.dev_pairs", 0, "--data.batch_size", 4, "--data.curriculum.schedule", "uniform"]
    return [*given, "--trainer.max_epochs", 1, *words]


def plan_of(shards: Path, toy_world: Path) -> tuple[list[Source], EpochPlan]:
    """The plan of `command`, made here: what each rank has to train on."""
    module = PyramidDataModule(
        str(shards),
        str(toy_world / "base"),
        steps_per_epoch=6,
        num_epochs=1,
        batch_size=4,
        seed=7,
        num_workers=0,
        curriculum=Curriculum(schedule="uniform"),
        dev_pairs=0,
    )
    module.setup()
    sources = open_sources(shards)
    return [sources[name] for name in module.sources], module._begin_epoch()


def shard_of(shards: Path, source: Source, row: int) -> tuple[Path, int]:
    """File and first byte of a row."""
    shard = int(source.key(row).split("_")[-2])
    return shards / source.record.shards[shard].file, int(source.index[row][OFFSET])


@pytest.mark.timeout(400)
def test_two_ranks_survive_what_they_can_and_stop_together(
    recipe: Path, toy_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(toy_world / "shards", shards)
    sources, plan = plan_of(shards, toy_world)
    step = plan.rows(1, 1, 2)
    source, row = sources[step.source], step.places[0][2]
    file, offset = shard_of(shards, source, row)
    whole = file.read_bytes()
    words = command(recipe, shards, tmp_path / "run", "--trainer.callbacks+=runs.Damage")

    # A shard is cut off while the run trains on it, and no row may be missing: both ranks stop, each with the reason.
    damage = json.dumps({"cut": [str(file), offset + 600]})
    strict = [*words, "--data.max_skip_rate", 0]
    assert runs.run(strict, tmp_path / "cut", ranks=2, seconds=200, GVE_DAMAGE=damage) == [2, 2]
    reasons = [(tmp_path / f"cut.{rank}").read_text().splitlines()[-1] for rank in (0, 1)]
    assert reasons[0] == reasons[1]
    assert reasons[0].startswith("gve fit: error: ")
    assert "samples could not be read, max_skip_rate is 0.0; the last one: " in reasons[0]
    masked = [json.loads(line) for path in (tmp_path / "run").glob("quarantine-*") for line in path.open()]
    assert source.key(row) in {entry["key"] for entry in masked}

    # Started again it is refused before it trains.
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in command(recipe, shards, tmp_path / "other")])
    assert end.value.code == 2
    assert (
        f"{file.name} of {shards} has {offset + 600} bytes, the manifest says {len(whole)}" in capsys.readouterr().err
    )

    # Mended, but for a pickle in the place of one sample; and one worker is killed, another aborts at a sample.
    file.write_bytes(whole)
    steps = [plan.rows(at, at % 2, 2) for at in (2, 3, 4)]
    hurt, killed, aborting = ((sources[rows.source], rows.places[0][2]) for rows in steps)
    trapped, start = shard_of(shards, *hurt)
    payload = pickle.dumps(Trap(tmp_path / "sprung"))
    content = bytearray(trapped.read_bytes())
    assert len(payload) < int(hurt[0].index[hurt[1]][SIZE])
    content[start : start + len(payload)] = payload
    trapped.write_bytes(content)
    keys = [where.key(number) for where, number in (hurt, killed, aborting)]
    damage = json.dumps({"kill": [keys[1], str(tmp_path / "fuse")], "abort": keys[2]})
    again = [*words, "--data.num_workers", 2]
    assert runs.run(again, tmp_path / "hurt", ranks=2, seconds=300, GVE_DAMAGE=damage) == [0, 0]
    assert not (tmp_path / "sprung").exists()
    entries = [json.loads(line) for path in (tmp_path / "run").glob("quarantine-*") for line in path.open()]
    reasons = [entry["reason"] for entry in entries if entry not in masked]
    assert {entry["key"] for entry in entries if entry not in masked} == {keys[0], keys[2]}
    assert any("not the ones indexed" in reason for reason in reasons)
    assert any("a loader worker was lost at it twice" in reason for reason in reasons)
    # Every row of the plan was trained on by its rank, once, or stands in the quarantine; none in the place of another.
    found = runs.history(tmp_path / "run", 2)
    expected = {
        at: [[[number, position] for number, position, _ in plan.rows(at, rank, 2).places] for rank in (0, 1)]
        for at in range(6)
    }
    assert {at: [rank["rows"] for rank in ranks] for at, ranks in found.items()} == expected


def test_workers_that_die_for_no_samples_sake_end_the_run(toy_world: Path, tmp_path: Path) -> None:
    """A sample is masked after two losses; workers that go on dying there (no memory) are not started for ever."""
    module = PyramidDataModule(
        str(toy_world / "shards"), str(toy_world / "base"), steps_per_epoch=2, batch_size=2, num_workers=1, dev_pairs=0
    )
    module.setup()
    loader = module.train_dataloader()
    loader._build.quarantine._file = tmp_path / "quarantine-0.jsonl"
    plan = module._begin_epoch()
    dead, lost = 2**22 + 1, Counter[str]()  # no process has a number above Linux's limit of 2 ** 22
    loader._build.in_flight[0] = torch.tensor([dead, 0, plan.rows(0).places[0][2]])
    for losses in range(1, 5):
        loader._bury(plan, RuntimeError("lost"), lost)
        assert (tmp_path / "quarantine-0.jsonl").exists() == (losses >= 2)
    with pytest.raises(ShardError, match=r"5 loader workers were lost at toy_.*, although it is masked"):
        loader._bury(plan, RuntimeError("lost"), lost)
