"""`gve bench [NAME...]`: holds benches, prints a table, writes JSON."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from gve.bench.measure import SIZES, Options, Trial, UnequalError, calls_of, hold, machine
from gve.bench.stock import prepare_torchvision
from gve.items import InputError

WIDTH = 140  # columns of tables where the output is no terminal


@dataclass(frozen=True)
class Bench:
    """One bench.

    Args:
        module: has `trials(options) -> Iterator[Trial]`; imported when the bench is asked for.
        line: what it measures.
        asked: only held when it is named.
    """

    module: str
    line: str
    asked: bool = False


BENCHES = {
    "loader": Bench("gve.bench.loader", "clips a core reads: raw files, pre-sampled shards; stall at tiny model speed"),
    "building": Bench(
        "gve.bench.building", "prompt, patches and positions of a sample against transformers' processor"
    ),
    "step": Bench("gve.bench.step", "a training step against stock transformers and sentence-transformers"),
    "loss": Bench("gve.bench.loss", "memory and time of a large symmetric InfoNCE against the full matrix"),
    "evaluation": Bench("gve.bench.evaluation", "items/s against mteb's loop; ranking against the bare matrix product"),
    "start": Bench("gve.bench.start", "seconds to start, memory over steps, cost of a resume, two ranks against one"),
    "accelerator": Bench(
        "gve.bench.accelerator", "3B and 7B shapes with random weights: samples/s, memory, FLOPs used", asked=True
    ),
}


def main(argv: Sequence[str]) -> int:
    """Holds benches.

    Args:
        argv: the words after `gve bench`.

    Returns:
        0 done (an aim that is missed is told, no failure), 1 two ways of the same work gave different outputs.

    Raises:
        InputError: a bench that was named cannot be held here.
    """
    arguments = _parser().parse_args(argv)
    if arguments.list:
        print(json.dumps({name: bench.line for name, bench in BENCHES.items()}) if arguments.json else _listing())
        return 0
    names = _names(arguments.names)
    if arguments.videos is not None and not arguments.videos.is_dir():
        raise InputError(f"--videos {arguments.videos}: no such folder")
    prepare_torchvision()
    report: dict[str, Any] = {"version": 1, "begun": datetime.now(UTC).isoformat(timespec="seconds")}
    report |= {"argv": list(argv), **machine(), "records": []}
    console = Console(stderr=True)
    with stoppable(), tempfile.TemporaryDirectory(prefix="gve-bench-") as folder:
        for name in names:
            place = Path(folder, name)
            place.mkdir()
            options = Options(place, arguments.rounds, arguments.size, arguments.device, arguments.videos)
            for record in _held(name, options, console, named=bool(arguments.names)):
                report["records"].append({"bench": name, **record})
                if arguments.out:
                    _write(arguments.out, report)
    if arguments.json:
        print(json.dumps(report))
    else:
        _print(report)
    return int(any("unequal" in record for record in report["records"]))


@contextmanager
def stoppable() -> Iterator[None]:
    """Inside, SIGTERM ends the process as Ctrl-C does: a fit that a bench has begun goes along, and so do its files."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _held(name: str, options: Options, console: Console, *, named: bool) -> Iterator[dict[str, Any]]:
    """The records of one bench. One that cannot be held here is told; if it was named, its reason ends the command."""
    try:
        trials: Iterator[Trial] = importlib.import_module(BENCHES[name].module).trials(options)
        for trial in trials:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            with Progress(*columns, console=console, transient=True) as progress:
                task = progress.add_task(f"{name}: {trial.what}", total=calls_of(trial, options.rounds))
                try:
                    yield hold(trial, options.rounds, lambda task=task: progress.advance(task))  # type: ignore[misc]
                except UnequalError as error:
                    yield {"what": trial.what, "setting": dict(trial.setting), "unequal": str(error)}
    except InputError as error:
        if named:
            raise
        yield {"what": BENCHES[name].line, "skipped": str(error)}


def _names(asked: Sequence[str]) -> list[str]:
    if unknown := [name for name in asked if name not in BENCHES]:
        raise InputError(f"unknown bench {unknown[0]!r}; one of: {', '.join(BENCHES)}")
    return list(dict.fromkeys(asked)) or [name for name, bench in BENCHES.items() if not bench.asked]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gve bench",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Measures what this machine does beside the stock way of doing the same work: outputs are compared "
        "first, then the ways alternate, and the ratio is taken within each round. Ratios of one run compare; seconds "
        "belong to their machine. `--list` tells the benches.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="benches to hold; all but those marked 'when named'")
    parser.add_argument("--list", action="store_true", help="list the benches and end")
    parser.add_argument("--rounds", type=int, default=5, help="times each way is timed")
    parser.add_argument("--size", choices=SIZES, default="tiny", help="of the model, where a bench runs one")
    parser.add_argument("--device", default="cpu", help="device of the model: cpu or cuda")
    parser.add_argument("--videos", type=Path, metavar="DIR", help="clips of your own to decode; rendered without")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the report as JSON, after every trial")
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of the table")
    return parser


def _listing() -> str:
    return "\n".join(
        f"{name:<13}{bench.line}{' (when named)' if bench.asked else ''}" for name, bench in BENCHES.items()
    )


def _write(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.tmp")
    draft.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(draft, path)


def _print(report: dict[str, Any]) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    hardware, load = report["hardware"], [x for r in report["records"] for x in r.get("load", [])]
    console.print(
        f"{hardware['processor'] or hardware['machine']}, {hardware['cores']} cores, {hardware['threads']} threads, "
        f"torch {report['versions']['torch']}" + (f", load {min(load)} to {max(load)}" if load else ""),
        markup=False,
    )
    table = Table("bench", "what", "result: median (least to largest)", "aim", "met")
    for record in report["records"]:
        for line, aim, met in _lines(record):
            table.add_row(record["bench"], record["what"], line, aim, {True: "yes", False: "NO", None: ""}[met])
        table.add_section()
    console.print(table, markup=False)


def _lines(record: dict[str, Any]) -> Iterator[tuple[str, str, bool | None]]:
    """(result, aim, met) of a record, a line for every number."""
    for key in ("skipped", "unequal"):
        if key in record:
            yield f"{key}: {record[key]}", "", False if key == "unequal" else None
            return
    if "value" in record:
        bounds = [f"{sign} {record[key]:g}" for sign, key in (("<=", "at_most"), (">=", "at_least")) if
                  record[key] is not None]  # fmt: skip
        yield f"{_range(record['value'])} {record['unit']}", " and ".join(bounds), record["met"]
        return
    per = f"{record['unit']}/{'core-' if record['clock'] == 'cpu' else ''}s"
    for name, one in record["contestants"].items():
        yield f"{name}: {one['per_second']:.4g} {per}, {_range(one['seconds'])} s", "", None
    for one in record["ratios"]:
        faster = one["kind"] == "faster"
        words = f"{one['ours']} is {{}} times as fast as {one['other']}" if faster else (
            f"{one['ours']} costs {{}} times {one['other']}")  # fmt: skip
        aim = "" if one["aim"] is None else f"{'>=' if faster else '<='} {one['aim']:g}"
        yield words.format(_range(one["ratio"])), aim, one["met"]


def _range(spread: dict[str, float]) -> str:
    return f"{spread['median']:.3g} ({spread['low']:.3g} to {spread['high']:.3g})"
