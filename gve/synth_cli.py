"""`gve synth run | status`."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column, Table

from gve.items import InputError

STOPPED = 85
"""Exit code after SIGTERM or SIGUSR1: what was done is kept, the same command goes on (as of `gve fit`)."""

CAPTIONERS = {
    "server": "gve.synth.server:ServerCaptioner",
    "local": "gve.synth.local:LocalCaptioner",
    "embedded": "gve.toy.embedded:EmbeddedCaptioner",
    "oracle": "gve.toy.oracle:Oracle",
}
"""Kind of captioner -> its class."""


def main(argv: Sequence[str]) -> int:
    """Runs one of the commands.

    Args:
        argv: the words after `gve synth`.

    Returns:
        0 done, 1 the work failed, 2 the input cannot be used, 85 stopped by a signal.
    """
    arguments = _parser().parse_args(argv)
    return arguments.handler(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gve synth", description="V-SynFlow: from weakly captioned videos to a multi-task training set."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    formatter = argparse.ArgumentDefaultsHelpFormatter
    run = commands.add_parser(
        "run",
        formatter_class=formatter,
        help="the pipeline: input, scan, select, enrich, extend, output",
        description="Runs the steps of a configuration. Interrupted work goes on with the same command; several "
        "commands on one --out (a SLURM array) share the work.",
    )
    run.add_argument("--config", required=True, help="YAML with a section for each step (configs/synth)")
    run.add_argument("--out", required=True, type=Path, help="folder of the run")
    run.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="changed values: output.prefix=mine")
    run.add_argument("--until", default="", metavar="STEP", help="last step; all when not given")
    run.add_argument(
        "--redo", default="", metavar="STEP", help="throw away this step and those after it, and do them again"
    )
    run.add_argument("--workers", type=int, help="processes of this command; run.workers when not given")
    run.add_argument(
        "--task-index", type=int, help="which of several commands this is, from 0; of a SLURM array when not given"
    )
    run.add_argument("--num-tasks", type=int, help="how many commands share the work; of a SLURM array when not given")
    run.add_argument("--json", action="store_true", help="print the funnel as JSON")
    run.set_defaults(handler=_run)
    status = commands.add_parser("status", formatter_class=formatter, help="how far a run is, what it costs")
    status.add_argument("out", type=Path, help="folder of the run")
    status.add_argument("--price-prompt", type=float, help="of a million tokens read; the run's own when not given")
    status.add_argument("--price-completion", type=float, help="of a million tokens written")
    status.add_argument("--check", action="store_true", help="also compare every finished file with its manifest")
    status.add_argument("--json", action="store_true", help="print the state as JSON")
    status.set_defaults(handler=_status)
    return parser


def _run(arguments: argparse.Namespace) -> int:
    from gve.synth.config import make_plan, read_config
    from gve.synth.crew import WorkError, redo, run

    changes = list(arguments.set)
    if arguments.workers is not None:
        changes.append(f"run.workers={arguments.workers}")
    values = read_config(arguments.config, changes)
    plan = make_plan(values, arguments.out, captioners=CAPTIONERS, until=arguments.until)
    index, count = slurm_share(arguments.task_index, arguments.num_tasks, os.environ)
    stopped = False

    def stop(*_: Any) -> None:
        nonlocal stopped
        stopped = True
        sys.exit(STOPPED)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        if arguments.redo:
            redo(plan, arguments.redo)
        with _progress(arguments.out):
            funnel = run(plan, arguments.until, index, count)
    except WorkError as error:
        print(f"gve synth run: failed: {error}", file=sys.stderr)
        return 1
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if stopped:
            print("gve synth run: stopped; the same command goes on", file=sys.stderr)
    if arguments.json:
        print(json.dumps(funnel))
        return 0
    _print_funnel(funnel)
    if funnel["steps"] and funnel["steps"][-1]["step"] == "output":
        print(f"shards: {arguments.out / 'shards'} (its README.md is the data card)")
    return 0


def slurm_share(index: int | None, count: int | None, environment: Any) -> tuple[int, int]:
    """(index from 0, count) of this command among those that share a run.

    Args:
        index, count: as given on the command line.
        environment: where SLURM says it for a job of an array.

    Raises:
        InputError: only one of both is given.
    """
    if (index is None) != (count is None):
        raise InputError("give --task-index and --num-tasks together, or neither (a SLURM array sets both)")
    if index is not None and count is not None:
        return index, count
    if "SLURM_ARRAY_TASK_ID" not in environment:
        return 0, 1
    first, step = (int(environment.get(f"SLURM_ARRAY_TASK_{name}", dflt)) for name, dflt in (("MIN", 0), ("STEP", 1)))
    place = (int(environment["SLURM_ARRAY_TASK_ID"]) - first) // max(1, step)
    return place, max(place + 1, int(environment.get("SLURM_ARRAY_TASK_COUNT", 1)))


def _print_funnel(funnel: dict[str, Any]) -> None:
    table = Table(Column("step", no_wrap=True), "in", "out", "rejected", "made / tried", "tokens")
    for step in funnel["steps"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in step["rejected"].items())
        parts, usage = step["parts"], step["usage"]
        tokens = usage["prompt_tokens"] + usage["completion_tokens"]
        table.add_row(
            step["step"],
            str(step["in"]),
            str(step["out"]),
            reasons or "0",
            f"{parts['made']} / {parts['tried']}" if parts["tried"] else "",
            f"{tokens:,}" if tokens else "",
        )
    # Rich takes 80 columns for a pipe or a log file, which would cut the headers off.
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _status(arguments: argparse.Namespace) -> int:
    from gve.synth.status import Watch, check_files

    prices = {"price_prompt": arguments.price_prompt, "price_completion": arguments.price_completion}
    state = Watch(arguments.out, {name: price for name, price in prices.items() if price is not None}).look()
    problems = check_files(arguments.out) if arguments.check else []
    if arguments.check:
        state["problems"] = problems
    if arguments.json:
        print(json.dumps(state))
        return 1 if problems else 0
    table = Table(Column("step", no_wrap=True), "state", "units", "rows", "rate", "left", "rejected", "failed parts")
    for name, step in state["steps"].items():
        units, rows = step["units"], step["rows"]
        claimed = f" (+{units['claimed']} in work)" if units["claimed"] else ""
        reasons = [
            ", ".join(f"{count} {reason}" for reason, count in step[key].items()) for key in ("rejected", "failed")
        ]
        table.add_row(
            name,
            step["state"],
            f"{units['finished']}/{units['all'] or '?'}{claimed}",
            f"{rows['done']}/{rows['all'] or '?'}",
            f"{step['rate']}/s" if step["rate"] else "",
            _duration(step["eta_s"]),
            *reasons,
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    usage = state["usage"]
    print(
        f"{len(state['workers'])} worker(s); {usage['requests']:,} questions, {usage['prompt_tokens']:,} tokens read, "
        f"{usage['completion_tokens']:,} written; cost {state['cost']:g}"
    )
    for problem in problems:
        print(problem)
    return 1 if problems else 0


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return (
        f"{seconds / 3600:.1f} h"
        if seconds >= 5400
        else f"{seconds / 60:.0f} min"
        if seconds >= 90
        else f"{seconds:.0f} s"
    )


@contextmanager
def _progress(out: Path, every_s: float = 1.0, log_s: float = 30.0) -> Iterator[None]:
    """Shows how far the run is while the block works: bars on a terminal, else a line now and then."""
    from gve.synth.status import Watch

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    end = threading.Event()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:

        def show() -> None:
            tasks: dict[str, Any] = {}
            watch, said = None, time.monotonic()
            while not end.wait(every_s):
                try:
                    watch = watch or Watch(out)
                    steps = watch.look()["steps"]
                except (InputError, OSError):  # the run has not begun to write, or a file has just gone
                    continue
                for name, step in steps.items():
                    if step["state"] == "waiting":
                        continue
                    note = f"{step['rate'] or 0:g}/s {_duration(step['eta_s'])}" if step["state"] == "open" else "done"
                    if name not in tasks:
                        tasks[name] = bars.add_task(name, total=None, note=note)
                    bars.update(tasks[name], completed=step["rows"]["done"], total=step["rows"]["all"], note=note)
                    if not console.is_terminal and step["state"] == "open" and time.monotonic() - said > log_s:
                        said = time.monotonic()
                        rows = step["rows"]
                        print(f"{name}: {rows['done']}/{rows['all'] or '?'} rows, {note}", file=sys.stderr)

        thread = threading.Thread(target=show, daemon=True)
        thread.start()
        try:
            yield
        finally:
            end.set()
            thread.join()
