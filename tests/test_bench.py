"""The frame of `gve bench` measures what happens: sleeps show, outputs that differ are refused, aims are judged."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gve.bench import cli, measure
from gve.bench.cli import BENCHES, Bench, main
from gve.bench.measure import (
    Aim,
    Contest,
    Gauge,
    Options,
    Timed,
    Trial,
    UnequalError,
    calls_of,
    hold,
    largest_difference,
)
from gve.items import InputError


def sleeper(seconds: float, output: Any = 1.0) -> Any:
    def work() -> Any:
        time.sleep(seconds)
        return output

    return work


def spinner(seconds: float) -> Any:
    def work() -> float:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass
        return 1.0

    return work


def test_a_sleep_of_50_ms_shows() -> None:
    """The slow way's seconds hold the sleep, with the wall clock; what the rest of the machine does may add to both."""
    contest = Contest("sleeps", {"ours": sleeper(0.0), "stock": sleeper(0.05)}, [Aim("ours", "stock")], count=10)
    record = hold(contest, rounds=3)
    slow = record["contestants"]["stock"]
    assert 0.05 <= slow["seconds"]["low"] <= slow["seconds"]["median"] <= slow["seconds"]["high"]
    assert slow["per_second"] == pytest.approx(10 / slow["seconds"]["median"])


def test_the_cpu_clock_counts_work_and_no_waiting() -> None:
    contest = Contest("clocks", {"works": spinner(0.05), "waits": sleeper(0.05)}, [], clock="cpu")
    seconds = {name: one["seconds"]["median"] for name, one in hold(contest, rounds=1)["contestants"].items()}
    assert seconds["works"] >= 0.05
    assert seconds["waits"] < 0.03


def test_ratios_are_taken_within_a_round_by_hand() -> None:
    """A round in which the machine is five times slower leaves the ratio as it is: 2, 2 and 2 (of medians: 3 / 1.5)."""
    speeds = {"ours": iter([0.0, 1.0, 5.0, 1.5]), "stock": iter([0.0, 2.0, 10.0, 3.0])}
    order = []

    def way(name: str) -> Any:
        def work() -> Timed:
            order.append(name)
            return Timed(next(speeds[name]), 7)

        return work

    aims = [Aim("ours", "stock", "faster", 2.0), Aim("ours", "stock", "cost", 0.4), Aim("stock", "ours")]
    record = hold(Contest("by hand", {name: way(name) for name in speeds}, aims), rounds=3)
    assert order == ["ours", "stock"] * 4  # the first pair warms up
    assert record["contestants"]["stock"]["seconds"] == {"median": 3.0, "low": 2.0, "high": 10.0}
    faster, cost, free = record["ratios"]
    assert faster["ratio"] == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert (faster["met"], cost["met"], free["met"]) == (True, False, None)
    assert cost["ratio"]["median"] == 0.5


@pytest.mark.parametrize(
    ("ours", "theirs", "difference"),
    [
        (1.0, 1.25, 0.25),
        ({"a": [1, 2]}, {"a": [1, 4]}, 2.0),
        (torch.tensor([1.0, 2.0], dtype=torch.bfloat16), np.array([1.0, 2.5]), 0.5),
        (np.zeros(3), np.zeros(4), np.inf),
        ({"a": 1}, {"b": 1}, np.inf),
        ([1, 2], [1], np.inf),
        (np.array([np.nan]), np.array([np.nan]), np.inf),
        ("left", "right", np.inf),
        (np.zeros((0, 3)), np.zeros((0, 3)), 0.0),
    ],
)
def test_differences_by_hand(ours: Any, theirs: Any, difference: float) -> None:
    assert largest_difference(ours, theirs) == difference


def test_outputs_that_differ_are_refused() -> None:
    def race(tolerance: float, uncompared: frozenset[str] = frozenset()) -> dict[str, Any]:
        ways = {"ours": sleeper(0.0, np.array([1.0, 2.0])), "stock": sleeper(0.0, np.array([1.0, 2.5]))}
        return hold(Contest("sums", ways, [], tolerance=tolerance, uncompared=uncompared), rounds=1)

    with pytest.raises(UnequalError, match=r"sums: the outputs of ours and stock differ by 0\.5, more than 0\.1"):
        race(0.1)
    assert race(0.5)["difference"] == 0.5
    assert race(0.1, frozenset({"stock"}))["difference"] == 0  # it does less by design, and nobody compares it


def test_gauges_and_bounds() -> None:
    values = iter([3.0, 1.0, 2.0])
    record = hold(Gauge("numbers", lambda: next(values), "s", at_most=2.0), rounds=3)
    assert record["value"] == {"median": 2.0, "low": 1.0, "high": 3.0}
    assert record["met"] is True
    assert hold(Gauge("low", lambda: 1.0, "times", at_least=1.8), rounds=1)["met"] is False
    assert hold(Gauge("free", lambda: 1.0, "s"), rounds=1)["met"] is None


def test_the_bar_is_told_of_every_call() -> None:
    for trial in (Contest("c", {"a": sleeper(0), "b": sleeper(0)}, [], warmups=2), Gauge("g", lambda: 0.0, "s")):
        ticks: list[None] = []
        hold(trial, 3, lambda ticks=ticks: ticks.append(None))  # type: ignore[misc]
        assert len(ticks) == calls_of(trial, 3)


# ---------------------------------------------------------------------------------------------------- the command line


@pytest.fixture
def benches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three benches: one that works, one whose ways differ, one that lacks a library; and one held only when named."""

    def good(options: Options) -> Iterator[Trial]:
        assert not any(options.folder.iterdir())
        (options.folder / "data").touch()
        ways = {"gve": lambda: Timed(1.0), "stock": lambda: Timed(2.0)}
        yield Contest("sleeps", ways, [Aim("gve", "stock", "faster", 1.5)])
        yield Gauge("rounds", lambda: float(options.rounds), "rounds", at_most=1)

    def unequal(options: Options) -> Iterator[Trial]:
        yield Contest("sums", {"gve": sleeper(0.0, 1.0), "stock": sleeper(0.0, 2.0)}, [])
        yield Gauge("goes on", lambda: 1.0, "s")

    def lacking(options: Options) -> Iterator[Trial]:
        raise InputError("the stock way needs nothing: pip install it")
        yield

    table = {"good": good, "unequal": unequal, "lacking": lacking, "named": good}
    modules = {f"bench.{name}": types.SimpleNamespace(trials=trials) for name, trials in table.items()}
    monkeypatch.setattr(cli.importlib, "import_module", modules.__getitem__)
    monkeypatch.setattr(cli, "prepare_torchvision", lambda: None)
    monkeypatch.setattr(cli, "BENCHES", {n: Bench(f"bench.{n}", f"line of {n}", n == "named") for n in table})


@pytest.mark.usefixtures("benches")
def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "made" / "report.json"
    assert main(["--rounds", "2", "--json", "--out", str(out)]) == 1  # two ways gave different outputs
    report = json.loads(capsys.readouterr().out)
    assert json.loads(out.read_text())["records"] == report["records"]
    assert sorted(path.name for path in out.parent.iterdir()) == ["report.json"]  # no draft is left
    assert [(r["bench"], r["what"]) for r in report["records"]] == [
        ("good", "sleeps"), ("good", "rounds"), ("unequal", "sums"), ("unequal", "goes on"),
        ("lacking", "line of lacking"),
    ]  # fmt: skip
    first, second, sums, _, lacking = report["records"]
    assert first["rounds"] == 2
    assert len(first["load"]) == 2
    assert first["ratios"][0]["met"] is True
    assert (second["value"]["median"], second["met"]) == (2.0, False)
    assert "differ by 1" in sums["unequal"]
    assert "pip install it" in lacking["skipped"]
    assert report["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert report["hardware"]["cores"] >= 1


@pytest.mark.usefixtures("benches")
def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["good", "--rounds", "1"]) == 0  # a missed aim is told; it is no failure
    text = capsys.readouterr().out
    assert "gve is" in text
    assert "times as fast as stock" in text
    assert ">= 1.5" in text
    assert "yes" in text


@pytest.mark.usefixtures("benches")
def test_what_cannot_be_held(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for words, reason in (
        (["lacking"], "pip install it"),
        (["nix"], "unknown bench 'nix'; one of: good, unequal, lacking, named"),
        (["good", "--rounds", "0"], "--rounds 0"),
        (["good", "--videos", str(tmp_path / "none")], "no such folder"),
    ):
        with pytest.raises(InputError, match=reason):
            main(words)
    assert main(["--list"]) == 0
    assert "line of named (when named)" in capsys.readouterr().out


def test_every_bench_is_there() -> None:
    for name, bench in BENCHES.items():
        assert importlib.util.find_spec(bench.module) is not None, name


def test_the_record_names_the_machine() -> None:
    facts = measure.machine()
    assert facts["versions"]["transformers"]
    assert set(facts["hardware"]) == {"machine", "processor", "cores", "threads", "memory_gib", "gpus"}


def test_a_stopped_bench_leaves_no_fit_behind(tmp_path: Path) -> None:
    """SIGTERM while a child works: the child goes along, and the folder is removed."""
    code = f"""
import subprocess, sys, tempfile
from pathlib import Path
from gve.bench.cli import stoppable
with stoppable(), tempfile.TemporaryDirectory(dir={str(tmp_path)!r}) as folder:
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(100)"
    subprocess.run([sys.executable, "-c", child], check=True)
"""
    bench = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert bench.stdout is not None
    child = int(bench.stdout.readline())
    bench.terminate()
    assert bench.wait(20) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    assert not list(tmp_path.iterdir())


def test_benches_are_listed_before_lightning_is_imported() -> None:
    """It imports torchvision where that is, and a wheel for CUDA raises beside torch for CPU until it is prepared."""
    code = "import sys, gve.bench.cli; print([name for name in ('lightning', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
