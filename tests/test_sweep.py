"""Sweeps: ids, order, what is laid over what, faults of one run, the table, and what its numbers carry."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats

import runs as processes
from gve.cli import main
from gve.items import InputError
from gve.sweep.collect import COLUMNS, METRICS, VOLATILE, Row, collect, read_table, write_results
from gve.sweep.crew import STOPPED, Child, Crew, Outcome, Site, last_line, read_state
from gve.sweep.paired import adjusted, compare, mean_interval, paired_effect, scores_of
from gve.sweep.plan import Sweep, machine_values, merged, read_sweep, share
from gve.sweep.scaling import log_fit
from gve.sweep.tables import against, arm_lines, comparison_lines

FAKE = """
import json, os, pathlib, sys, time
step, folder = sys.argv[1], pathlib.Path(sys.argv[2])
with open(folder.parent / "order.txt", "a") as file:
    file.write(f"{step} {folder.name}\\n")
if "bad" in folder.name and not os.environ.get("MENDED"):
    sys.exit("this cell cannot be trained")
if "slow" in folder.name:
    import signal
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(85))
    (folder / "ready").touch()
    time.sleep(250)
    sys.exit(3)
(folder / "checkpoints").mkdir(exist_ok=True)
(folder / "checkpoints" / "last.ckpt").write_text("weights")
"""
"""Stands in for `gve fit` where only the order and the end of processes are looked at: a process all the same."""


def write_file(folder: Path, cells: Mapping[str, Any], **head: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "base.yaml").write_text("# a comment\nmodel: {base: x, temperature: 0.1}\ntrainer: part.yaml\n")
    (folder / "part.yaml").write_text("max_epochs: 2\n")
    (folder / "sweep.yaml").write_text(
        yaml.safe_dump({"configs": ["base.yaml"], **head, "cells": dict(cells)}, sort_keys=False)
    )
    return folder / "sweep.yaml"


def fake_spawn(words: list[str], log: Path, environment: Mapping[str, str]) -> Child:
    folder = words[words.index("--trainer.default_root_dir") + 1]
    with open(log, "wb") as file:
        return subprocess.Popen(
            [sys.executable, "-c", FAKE, words[0], folder], stdout=file, stderr=file, env=environment
        )


def work(sweep: Sweep, out: Path, **options: Any) -> tuple[Outcome, list[str]]:
    """Does a sweep of stand-ins; how it ended, and what was said."""
    said: list[str] = []
    crew = Crew(Site(out), options.pop("jobs", 1), spawn=fake_spawn, say=said.append)
    return crew.work(sweep.runs(**options)), said


def order(out: Path, sweep: Sweep) -> list[str]:
    return [line.split("-s")[0] for line in (out / sweep.name / "order.txt").read_text().splitlines()]


def test_a_run_is_named_by_what_is_configured_and_by_nothing_else(tmp_path: Path) -> None:
    cells = {"a": {"set": {"model": {"temperature": 0.2}}}, "b": {}}
    first = {
        (run.cell.name, run.seed): run.id for run in read_sweep(write_file(tmp_path / "s", cells, seeds=[0, 1])).runs()
    }
    assert len(set(first.values())) == 4
    assert all(name.startswith(f"{cell}-s{seed}-") for (cell, seed), name in first.items())

    def ids(folder: str, **changes: Any) -> dict[tuple[str, int], str]:
        file = write_file(tmp_path / folder / "s", changes.pop("cells", cells), seeds=[0, 1], **changes)
        for name, text in changes.pop("files", {}).items():
            (file.parent / name).write_text(text)
        return {(run.cell.name, run.seed): run.id for run in read_sweep(file).runs()}

    assert ids("elsewhere") == first, "the place of the files is none of its business"
    moved = tmp_path / "other" / "s"
    write_file(moved, cells, seeds=[0, 1])
    (moved / "base.yaml").write_text("trainer: part.yaml\nmodel: {temperature: 0.1, base: x}  # other words\n")
    assert {r.id for r in read_sweep(moved).runs()} == set(first.values()), "comments and order neither"
    (moved / "part.yaml").write_text("max_epochs: 3\n")
    assert not {r.id for r in read_sweep(moved).runs()} & set(first.values()), "a named part is"
    changed = ids("cells", cells={**cells, "a": {"set": {"model": {"temperature": 0.3}}}})
    assert {key for key in first if changed[key] != first[key]} == {("a", 0), ("a", 1)}
    assert not set(ids("steps", steps=["fit"]).values()) & set(first.values())
    # Another sweep's runs of equal configuration are runs of their own.
    renamed = read_sweep(write_file(tmp_path / "t", cells, seeds=[0, 1])).runs()
    assert not {run.id for run in renamed} & set(first.values())


def test_layers_lie_in_the_stated_order(tmp_path: Path) -> None:
    """Configs, overlays, values of the file and of the cell, the seed, the world, the machine; toy values instead."""
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "over.yaml").write_text("model: {temperature: 0.5}\n")
    toy = {"configs": ["base.yaml"], "world": {"scale": 0.5}, "seeds": [7], "set": {"data": {"num_workers": 0}}}
    cells = {
        "a": {
            "overlays": ["over.yaml"],
            "set": {"data": {"batch_size": 8}},
            "toy": {"set": {"data": {"batch_size": 2}}},
        },
        "real": {"toy": False},
        "small": {"real": False},
    }
    file = write_file(tmp_path / "s", cells, toy=toy, set={"data": {"dev_pairs": 4, "batch_size": 1}})
    real, small = read_sweep(file), read_sweep(file, toy=True)
    assert [cell.name for cell in real.cells] == ["a", "real"]
    assert [cell.name for cell in small.cells] == ["a", "small"]
    assert (real.name, small.name, small.seeds) == ("s", "s-toy", (7,))
    assert [path.name for path in real.cells[0].configs] == ["base.yaml", "over.yaml"]
    site = Site(tmp_path / "out", machine_values(["trainer.devices=2", "data.root=/data/shards"]))
    assert site.overlay(real.runs()[0]) == {
        "data": {"dev_pairs": 4, "batch_size": 8, "root": "/data/shards"},
        "seed_everything": 42,
        "trainer": {"devices": 2},
    }
    world = tmp_path / "out" / "worlds" / "x0.5-t1-s0-A"
    assert Site(tmp_path / "out").overlay(small.runs()[0]) == {
        "data": {"num_workers": 0, "batch_size": 2, "root": str(world / "shards")},
        "seed_everything": 7,
        "model": {"base": str(world / "base")},
        "uvrb": {"root": str(world / "uvrb")},
    }
    words = site.words(real.runs()[0], "validate")
    assert words[-2:] == ["--ckpt_path", str(site.folder(real.runs()[0]) / "checkpoints" / "last.ckpt")]
    assert merged({"a": {"b": 1, "c": 2}}, {"a": {"b": [3]}}, {"d": None}) == {"a": {"b": [3], "c": 2}, "d": None}


@pytest.mark.parametrize(
    ("cells", "head", "said"),
    [
        ({"a": {"sett": {}}}, {}, "unknown key sett"),
        ({"a": {}}, {"steps": ["validate", "fit"]}, "in this order"),
        ({"a": {}}, {"seeds": [1, 1]}, "different whole numbers"),
        ({"a": {}}, {"baseline": "b"}, "none of its cells"),
        ({"a b": {}}, {}, "names a folder"),
        ({"a": {"overlays": ["none.yaml"]}}, {}, "no configuration at"),
        ({}, {}, "no cells"),
        ({"a": {"set": {"x": "{run:b}"}}, "b": {"set": {"x": "{run:a}"}}}, {}, "need one another"),
        ({"a": {"set": {"x": "{run:c}"}}}, {}, "needs cell c"),
    ],
)
def test_a_bad_file_is_refused_with_its_place(
    cells: dict[str, Any], head: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said):
        read_sweep(write_file(tmp_path / "s", cells, **head)).runs()


def test_only_a_machines_values_come_from_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert machine_values(["trainer.devices=8", "trainer.strategy=ddp"]) == {
        "trainer": {"devices": 8, "strategy": "ddp"}
    }
    with pytest.raises(InputError, match="another cell"):
        machine_values(["model.temperature=0.5"])
    file = write_file(tmp_path / "s", {"a": {}})
    with pytest.raises(SystemExit) as end:
        main(["sweep", "run", str(file), "--toy"])
    assert end.value.code == 2
    assert "no part `toy`" in capsys.readouterr().err


def test_tasks_of_an_array_share_the_runs_and_never_wait_for_one_another(tmp_path: Path) -> None:
    cells = {"a": {}, "b": {"set": {"x": "{run:a}"}}, "c": {}, "d": {"set": {"x": "{run:b}", "y": "{run:c}"}}, "e": {}}
    sweep = read_sweep(write_file(tmp_path / "s", cells, seeds=[0, 1, 2]))
    all_runs = sweep.runs()
    for count in (1, 2, 4, 20):
        parts = [share(all_runs, index, count) for index in range(count)]
        assert sorted(run.id for part in parts for run in part) == sorted(run.id for run in all_runs)
        for part in parts:
            ids = [run.id for run in part]
            for run in part:
                assert all(ids.index(other) < ids.index(run.id) for other in run.needs.values())
    # d joins a, b and c of its seed; e stands alone: two groups a seed.
    assert [len(part) for part in (share(all_runs, index, 6) for index in range(6))] == [4, 1] * 3
    # What a run needs is part of its id.
    ids = {run.cell.name: run.config for run in all_runs}
    cells["a"] = {"set": {"model": {"temperature": 1.0}}}
    again = {run.cell.name: run.config for run in read_sweep(write_file(tmp_path / "s", cells)).runs()}
    assert {name for name in ids if ids[name] != again[name]} == {"a", "b", "d"}


def test_one_failure_stops_no_other_and_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = {"bad": {}, "after": {"set": {"x": "{run:bad}"}}, "good": {}, "more": {}}
    sweep = read_sweep(write_file(tmp_path / "s", cells, seeds=[0], steps=["fit"]))
    outcome, _ = work(sweep, tmp_path / "out", jobs=2)
    ids = {run.cell.name: run.id for run in sweep.runs()}
    assert sorted(outcome.done) == sorted([ids["good"], ids["more"]])
    assert outcome.failed[ids["bad"]] == "fit ended with 1: this cell cannot be trained"
    assert outcome.failed[ids["after"]] == f"needs {ids['bad']}, which is not done"
    assert outcome.code == 1
    rows = {row.cell: row.facts for row in collect(sweep, Site(tmp_path / "out"))}
    assert rows["bad"]["state"] == "failed"
    assert rows["bad"]["reason"] == "fit ended with 1: this cell cannot be trained"
    assert (rows["after"]["state"], rows["after"]["reason"]) == ("missing", "fit not begun")

    monkeypatch.setenv("MENDED", "1")
    outcome, _ = work(sweep, tmp_path / "out")
    assert sorted(outcome.done) == sorted(ids.values())
    assert outcome.code == 0
    started = order(tmp_path / "out", sweep)
    assert sorted(started[:3]) == ["fit bad", "fit good", "fit more"]
    assert started[3:] == ["fit bad", "fit after"], "what was done is not done again; what it needs comes first"
    state = read_state(Site(tmp_path / "out").folder(sweep.runs()[0]))
    assert (state["steps"]["fit"]["attempts"], state["steps"]["fit"]["state"]) == (2, "done")


def test_asked_to_stop_it_saves_and_goes_on_later(tmp_path: Path) -> None:
    """The step at work is told by SIGTERM and may save; no other is begun; 85 as of `gve fit`."""
    sweep = read_sweep(write_file(tmp_path / "s", {"slow": {}, "next": {}}, seeds=[0], steps=["fit"]))
    crew = Crew(Site(tmp_path / "out"), spawn=fake_spawn, say=lambda line: None)
    slow = Site(tmp_path / "out").folder(sweep.runs()[0])

    def stop() -> None:
        while not (slow / "ready").exists():
            time.sleep(0.02)
        crew.stop()

    threading.Thread(target=stop, daemon=True).start()
    outcome = crew.work(sweep.runs())
    assert (outcome.stopped, outcome.code) == ([sweep.runs()[0].id], STOPPED)
    assert order(tmp_path / "out", sweep) == ["fit slow"]
    row = collect(sweep, Site(tmp_path / "out"))[0]
    assert (row.facts["state"], row.facts["reason"]) == ("missing", "asked to stop in fit")


def test_two_commands_do_not_do_one_run_twice(tmp_path: Path) -> None:
    import fcntl

    sweep = read_sweep(write_file(tmp_path / "s", {"a": {}, "b": {}}, seeds=[0], steps=["fit"]))
    folder = Site(tmp_path / "out").folder(sweep.runs()[0])
    folder.mkdir(parents=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        outcome, _ = work(sweep, tmp_path / "out")
        assert outcome.elsewhere == [sweep.runs()[0].id]
        assert order(tmp_path / "out", sweep) == ["fit b"]
    outcome, _ = work(sweep, tmp_path / "out")
    assert len(outcome.done) == 2


# The real thing: two cells of the tiny toy recipe, one of which cannot run.


@pytest.fixture(scope="module")
def swept(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(sweep file, out) of a sweep that was run: `plain` is done, `broken` has no shards."""
    folder = tmp_path_factory.mktemp("sweep")
    shutil.copy(recipe, folder / "tiny.yaml")
    (folder / "less.yaml").write_text("data: {steps_per_epoch: 2}\ntrainer: {max_epochs: 1}\n")
    cells = {"plain": {"x": 100}, "broken": {"set": {"data": {"root": "/nowhere"}}}}
    head = {"configs": ["tiny.yaml", "less.yaml"], "seeds": [3], "set": {"uvrb": {"untrained": False}}}
    (folder / "sweep.yaml").write_text(yaml.safe_dump({**head, "cells": cells}, sort_keys=False))
    sweep = read_sweep(folder / "sweep.yaml")
    outcome = Crew(Site(folder / "out"), spawn=spawn, say=lambda line: None).work(sweep.runs())
    assert [len(outcome.done), len(outcome.failed)] == [1, 1], outcome
    return folder / "sweep.yaml", folder / "out"


def spawn(words: list[str], log: Path, environment: Mapping[str, str]) -> Child:
    """`gve <words>` as the sweep starts it, but forked from a process that has the imports behind it."""
    log.symlink_to(f"{log.name}.0")  # it names logs by rank
    (process,) = processes.start(words, log)
    process.poll = lambda: process.exitcode  # type: ignore[attr-defined]
    return process  # type: ignore[return-value]


def test_the_table_of_a_real_sweep(swept: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    file, out = swept
    with pytest.raises(SystemExit) as end:
        main(["sweep", "collect", str(file), "--out", str(out)])
    assert end.value.code == 1, "a run is not done"
    sweep = read_sweep(file)
    folder = Site(out).folder(sweep.runs()[0])
    rows = {row.cell: row for row in read_table(out / sweep.name / "results.csv")}
    results = json.loads((folder / "uvrb.json").read_text())
    plain = rows["plain"]
    assert plain.scores == {
        name: pytest.approx(value, abs=5e-7)
        for name, value in {
            **{name: row["value"] for name, row in results["sets"].items()},
            **results["abilities"],
        }.items()
    }
    assert len(plain.scores) == len(METRICS) == 27
    facts = plain.facts
    assert (facts["state"], facts["seed"], facts["x"], facts["step"]) == ("done", "3", "100", "2")
    assert facts["weights"] == results["weights"][:16]
    assert len(facts["commit"].rstrip("+")) == 12
    assert float(facts["seconds_fit"]) > 0
    assert facts["hardware"].endswith("threads")
    assert facts["run"] == folder.name
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["seed_everything"], config["data"]["steps_per_epoch"], config["trainer"]["max_epochs"]) == (3, 2, 1)
    broken = rows["broken"].facts
    assert broken["state"] == "failed"
    assert broken["reason"].startswith("fit ended with 2: gve fit: error:")
    assert not rows["broken"].scores
    capsys.readouterr()
    main_status = pytest.raises(SystemExit)
    with main_status as end:
        main(["sweep", "status", str(file), "--out", str(out), "--json"])
    assert end.value.code == 0
    assert [row["state"] for row in json.loads(capsys.readouterr().out)] == ["done", "failed"]


def test_the_table_is_restored_and_damage_is_marked(swept: tuple[Path, Path], tmp_path: Path) -> None:
    """results.csv deleted, one run folder damaged in every way it can be: the others' rows are the same as before."""
    file, before = swept
    out = tmp_path / "out"
    shutil.copytree(before, out)
    sweep = read_sweep(file)
    (run, broken) = sweep.runs()
    folder = Site(out).folder(run)

    def table() -> dict[str, dict[str, str]]:
        path = out / sweep.name / "results.csv"
        path.unlink(missing_ok=True)
        write_results(path, collect(sweep, Site(out)))
        return {row["cell"]: row for row in csv.DictReader(path.read_text().splitlines())}

    whole = table()
    assert list(whole["plain"]) == list(COLUMNS)
    for name, damage in (
        ("uvrb.json", lambda path: path.write_text(path.read_text()[:500])),
        ("uvrb.json", lambda path: path.write_text(path.read_text().replace('"value": 0.', '"value": 1.', 1))),
        ("uvrb.json", lambda path: path.unlink()),
        ("sweep.json", lambda path: path.write_text("{")),
        ("sweep.json", lambda path: path.write_text('{"steps": {"fit": {"state": "done"}}}')),
        ("run.json", lambda path: path.write_text("[]")),
        ("uvrb_positions.npz", lambda path: path.write_bytes(b"")),
        ("uvrb_positions.npz", lambda path: path.write_bytes(path.read_bytes()[:-1000])),
    ):
        kept = (folder / name).read_bytes()
        damage(folder / name)
        found = table()
        assert found["plain"]["state"] == "failed", name
        assert found["plain"]["reason"].startswith("damaged: "), found["plain"]["reason"]
        assert str(tmp_path) not in found["plain"]["reason"]
        assert not found["plain"]["AVG-A"]
        assert found["broken"] == whole["broken"]
        (folder / name).write_bytes(kept)
    shutil.rmtree(Site(out).folder(broken))
    assert table() == {"plain": whole["plain"], "broken": {**whole["broken"], **missing(table()["broken"])}}
    assert table()["broken"]["state"] == "missing"


def without_parts(value: Mapping[str, Any], *place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what, the value with one key of the mapping at `place` lost, null, or of another type), for each key there."""
    if place:
        for what, changed in without_parts(value[place[0]], *place[1:]):
            yield f"{place[0]}/{what}", {**value, place[0]: changed}
        return
    for key, inner in value.items():
        yield key, {name: one for name, one in value.items() if name != key}
        for other in (None, [], "?" if isinstance(inner, (int, float)) else 3):
            if other != inner:
                yield f"{key} {other}", {**value, key: other}


READ = {"steps", "attempts", "weights", "protocol", "step", "sets", "abilities"}
"""What the table is made of, in the three files."""


@pytest.mark.slow
def test_whatever_is_damaged_costs_its_own_row_alone(swept: tuple[Path, Path], tmp_path: Path) -> None:
    """Each file cut at any place, each of its keys lost or of another type: a marked row, or one that says the same."""
    file, before = swept
    out = tmp_path / "out"
    shutil.copytree(before, out)
    sweep, site = read_sweep(file), Site(out)
    folder = site.folder(sweep.runs()[0])
    whole = collect(sweep, site)
    marked: Counter[str] = Counter()

    def check(name: str, content: bytes, what: str, *, must: bool = True) -> None:
        (folder / name).write_bytes(content)
        plain, *others = collect(sweep, site)
        assert others == whole[1:], f"{name}, {what}"
        if plain.done:
            assert not must, f"{name}, {what}: not noticed"
            # What was lost is nothing that the scores come from.
            assert plain.scores == whole[0].scores, f"{name}, {what}"
            told = {key for key, value in plain.facts.items() if whole[0].facts[key] != value}
            assert told <= {"commit", *VOLATILE}, f"{name}, {what}: {told}"
            return
        marked[name] += 1
        assert not plain.scores, f"{name}, {what}"
        if plain.facts["state"] != "failed":
            # A step that the record no longer tells of is one that was never begun.
            assert (plain.facts["state"], what[:6]) == ("missing", "steps/"), f"{name}, {what}"
            return
        assert plain.facts["reason"].startswith("damaged: "), f"{name}, {what}: {plain.facts['reason']}"
        assert str(tmp_path) not in plain.facts["reason"]

    for name, places in {
        "sweep.json": [(), ("steps",), ("steps", "validate"), ("steps", "fit", "commit")],
        "run.json": [()],
        "uvrb.json": [(), ("protocol",), ("abilities",), ("sets", "MSRVTT")],
        "uvrb_positions.npz": [],
    }.items():
        content = (folder / name).read_bytes()
        for part in range(0, 20, 4):
            check(name, content[: len(content) * part // 20], f"cut to {part}/20")
        check(name, b"\xff" + content[1:], "its first byte")
        middle = len(content) // 2
        check(name, content[:middle] + bytes(64) + content[middle + 64 :], "64 bytes of zeros")
        for other in (b"[]", b"null", b"{}"):
            check(name, other, other.decode())
        for place in places:
            for what, changed in without_parts(json.loads(content), *place):
                check(name, json.dumps(changed).encode(), what, must=what.split()[0] in READ)
        (folder / name).write_bytes(content)
    assert collect(sweep, site) == whole
    assert len(marked) == 4
    assert min(marked.values()) >= 10, marked
    (folder / "sweep.json").unlink()
    (folder / "sweep.json").mkdir()
    assert collect(sweep, site)[1:] == whole[1:]


def missing(row: dict[str, str]) -> dict[str, str]:
    """What a run that was never begun says differently."""
    return {name: row[name] for name in ("state", "reason", "commit", *VOLATILE)}


def test_a_damaged_result_is_scored_again_by_the_same_weights(swept: tuple[Path, Path], tmp_path: Path) -> None:
    file, before = swept
    out = tmp_path / "out"
    shutil.copytree(before, out)
    sweep = read_sweep(file)
    plain = sweep.runs(only=["plain"])
    folder = Site(out).folder(plain[0])
    whole = (folder / "uvrb.json").read_bytes()
    (folder / "uvrb.json").write_text("{")
    said: list[str] = []
    # The configuration of the run names the folder it was made in; only validate is run, and it names this one.
    outcome = Crew(Site(out), spawn=spawn, say=said.append).work(plain)
    assert outcome.code == 0
    assert "validate is done again" in said[0]
    assert not any(": fit" in line for line in said), said
    assert (folder / "uvrb.json").read_bytes() == whole
    assert read_state(folder)["steps"]["validate"]["attempts"] == 2


@pytest.mark.slow
def test_processes_of_its_own_and_array_tasks_give_the_same_table(recipe: Path, tmp_path: Path) -> None:
    """`gve sweep run --jobs 2` against two array tasks in another folder, as processes of the command line."""
    shutil.copy(recipe, tmp_path / "tiny.yaml")
    cells = {"a": {"set": {"data": {"steps_per_epoch": 2}}}, "b": {"set": {"model": {"temperature": 0.2}}}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"configs": ["tiny.yaml"], "seeds": [0], "cells": cells}))

    def gve(*words: str, **env: str) -> int:
        return subprocess.call([sys.executable, "-m", "gve", "sweep", *words], env={**os.environ, **env})

    file, here, there = str(tmp_path / "sweep.yaml"), str(tmp_path / "here"), str(tmp_path / "there")
    assert gve("run", file, "--out", here, "--jobs", "2") == 0
    for task in ("0", "1"):
        array = {"SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "0"}
        assert gve("run", file, "--out", there, **array) == 0
    tables = []
    for out in (here, there):
        assert gve("collect", file, "--out", out) == 0
        rows = read_table(Path(out) / tmp_path.name / "results.csv")
        assert [row.facts["state"] for row in rows] == ["done", "done"]
        tables.append([(without(row), row.scores) for row in rows])
    assert tables[0] == tables[1]


def without(row: Row) -> dict[str, str]:
    return {name: value for name, value in row.facts.items() if name not in VOLATILE}


# What numbers carry.


def test_log_fit_equals_the_reference_and_a_hand_calculation() -> None:
    """scipy's least squares, and points that lie on 0.02 ln x + 0.1: there the line is exact."""
    x = [1e5, 1e6, 1e7]
    exact = log_fit(x, [0.02 * math.log(one) + 0.1 for one in x])
    assert exact.a == pytest.approx(0.02, abs=1e-12)
    assert exact.b == pytest.approx(0.1, abs=1e-12)
    assert exact.per_tenfold == pytest.approx(0.02 * math.log(10))
    assert exact.r2 == pytest.approx(1)
    # GVE-3B's CG by its published slope of +0.057 per tenfold, with scatter.
    y = [0.440, 0.493, 0.552]
    found = log_fit(x, y)
    line = stats.linregress(np.log(x), y)
    reach = 12.706204736 * line.stderr  # t of 0.975 with one degree of freedom, from a table
    assert found.a == pytest.approx(line.slope, rel=1e-12)
    assert found.b == pytest.approx(line.intercept, rel=1e-12)
    assert found.a_interval == pytest.approx((line.slope - reach, line.slope + reach), rel=1e-9)
    wide = 12.706204736 * line.intercept_stderr
    assert found.b_interval == pytest.approx((line.intercept - wide, line.intercept + wide), rel=1e-9)
    assert found.r2 == pytest.approx(line.rvalue**2, rel=1e-12)
    assert found.per_tenfold == pytest.approx(0.056, abs=1e-9)  # (0.552 - 0.440) / 2: x is even in ln x
    # Negative control: a line in log10 x, or in x itself, has another slope.
    assert abs(stats.linregress(np.log10(x), y).slope - found.a) > 0.01
    assert found.at(1e6) == pytest.approx(sum(y) / 3)
    assert math.isnan(log_fit(x[:2], y[:2]).a_interval[0])
    for bad in ([1e5, 1e5], [0.0, 1e5], [1e5]):
        with pytest.raises(InputError, match="two different x"):
            log_fit(bad, y[: len(bad)])


def test_log_fit_intervals_cover() -> None:
    """Of 2,000 seeded draws around a known line, 95% of the intervals hold the slope; half the width would not."""
    generator = np.random.default_rng(0)
    x = np.repeat([1e3, 3e3, 1e4], 3)
    held = narrow = 0
    for _ in range(2000):
        fit = log_fit(x.tolist(), (0.03 * np.log(x) + generator.normal(0, 0.01, len(x))).tolist())
        low, high = fit.a_interval
        held += low <= 0.03 <= high
        narrow += abs(fit.a - 0.03) <= (high - low) / 4
    assert 0.935 <= held / 2000 <= 0.965
    assert narrow / 2000 < 0.85


def test_paired_effect_by_hand() -> None:
    """Of 0.01, 0.02 and 0.03 the deviation is 0.01, the error 0.01 / sqrt 3; t of 0.975 and 0.8: 4.3027, 1.0607."""
    found = paired_effect([0.01, 0.02, 0.03])
    error = 0.01 / math.sqrt(3)
    assert found.value == pytest.approx(0.02)
    assert found.deviation == pytest.approx(0.01)
    assert found.interval == pytest.approx((0.02 - 4.302653 * error, 0.02 + 4.302653 * error), abs=1e-7)
    assert found.detectable == pytest.approx((4.302653 + 1.060660) * error, abs=1e-7)
    assert found.p == pytest.approx(stats.ttest_1samp([0.01, 0.02, 0.03], 0).pvalue, rel=1e-9)
    assert paired_effect([0.0, 0.0]).p == 1.0
    assert mean_interval([0.5])[0] == 0.5
    with pytest.raises(InputError, match="at least 2"):
        paired_effect([0.1])


def test_pairing_removes_what_the_seeds_share() -> None:
    """Arms whose seeds go up and down together: paired, a difference of 0.01 is seen; unpaired it drowns."""
    rows = []
    for seed, common in enumerate((0.10, 0.30, 0.20, 0.15, 0.25)):
        for cell, gain in (("uniform", 0.0), ("gve", 0.01 + 0.001 * (seed - 2))):
            facts = dict.fromkeys(COLUMNS, "") | {"cell": cell, "seed": str(seed), "state": "done", "protocol": "p"}
            rows.append(Row(facts, {"AVG-A": common + gain}))
    rows.append(dataclasses.replace(rows[0], facts={**rows[0].facts, "state": "failed", "seed": "9"}))
    scores = scores_of(rows, "AVG-A")
    effect = compare(scores, "gve", "uniform")
    assert effect.n == 5
    assert effect.value == pytest.approx(0.01)
    assert effect.p < 0.001
    assert stats.ttest_ind(list(scores["gve"].values()), list(scores["uniform"].values())).pvalue > 0.5
    assert adjusted({"a": effect, "b": dataclasses.replace(effect, p=0.04)})["b"] == pytest.approx(0.04)
    lines = comparison_lines(rows, against(rows, "uniform"), [["AVG-A"]])
    assert lines[2:] == ["| gve - uniform | AVG-A | +0.010 | +0.008 to +0.012 | 0.000 | 0.003 | higher |"]
    assert arm_lines(rows, ["AVG-A", "CMP"])[2].startswith("| uniform | 5 | 0.200<br>0.102 to 0.298 | - |")
    with pytest.raises(InputError, match="no done run of gve_s"):
        compare(scores, "gve_s", "uniform")
    rows[1].facts["protocol"] = "another"
    with pytest.raises(InputError, match="different protocols"):
        scores_of(rows, "AVG-A")


def test_the_reason_of_a_failure_is_the_commands_not_the_launchers(tmp_path: Path) -> None:
    log = tmp_path / "fit.log"
    assert last_line(log) == "no log"
    log.write_text("\n")
    assert last_line(log) == "the log is empty"
    log.write_text("srun: error: n1: task 0: Exited with exit code 2\n")
    assert last_line(log).startswith("srun: error")
    log.write_text(
        "epoch 1\ngve fit: error: gone holds no manifest.json\nsrun: error: n1: task 0: Exited with exit code 2\n\n"
    )
    assert last_line(log) == "gve fit: error: gone holds no manifest.json"
