"""`gve synth run | status | audit`."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
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
JUDGES = {kind: name for kind, name in CAPTIONERS.items() if kind != "embedded"}
"""Those that can judge: the tiny base follows no prompt but those it was taught."""


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
    _add_audit(commands)
    return parser


def _add_audit(commands: Any) -> None:
    audit = commands.add_parser(
        "audit",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        help="what the captions are, how much of them is true, what a benchmark has too",
        description="Counts captions and pairs beside what was asked for; lets a judge check a sample claim by claim; "
        "compares texts and videos with UVRB and writes the ids to leave out; writes one HTML page. Interrupted, the "
        "same command goes on.",
    )
    audit.add_argument("out", type=Path, help="folder of the run, finished or not")
    audit.add_argument("--sample", type=int, default=200, help="captions that are judged")
    audit.add_argument("--seed", type=int, default=0, help="of the sample, and of what the page shows")
    audit.add_argument(
        "--judge",
        nargs="+",
        metavar=("KIND", "KEY=VALUE"),
        help=f"who judges: {', '.join(JUDGES)} or module:Class, with its options, for example `server url=... "
        "model=...`; nobody when not given",
    )
    audit.add_argument(
        "--config", type=Path, help="YAML whose section `judge` has kind and options, instead of --judge"
    )
    audit.add_argument("--uvrb", type=Path, nargs="+", default=[], metavar="ROOT", help="folders of the benchmark")
    audit.add_argument("--ngram", type=int, default=13, help="words in a row that no text may share with the benchmark")
    audit.add_argument("--min-words", type=int, default=5, help="texts of fewer words are never taken for its texts")
    audit.add_argument(
        "--max-bits", type=float, default=6.0, help="mean bits of 64 by which hashes of frames may differ"
    )
    audit.add_argument("--texts-only", action="store_true", help="do not compare videos, which decodes all of them")
    audit.add_argument(
        "--exclude", type=Path, help="where the exclusion list goes; OUT/audit/exclude.jsonl if not given"
    )
    audit.add_argument("--html", type=Path, help="where the page goes; OUT/audit/audit.html if not given")
    audit.add_argument("--jobs", type=int, default=2, help="videos decoded side by side")
    audit.add_argument("--json", action="store_true", help="print the report as JSON")
    audit.set_defaults(handler=_audit)


def _run(arguments: argparse.Namespace) -> int:
    from gve.synth.config import make_plan, read_config
    from gve.synth.crew import WorkError, redo, run

    changes = list(arguments.set)
    if arguments.workers is not None:
        changes.append(f"run.workers={arguments.workers}")
    values = read_config(arguments.config, changes)
    plan = make_plan(values, arguments.out, captioners=CAPTIONERS, until=arguments.until)
    index, count = slurm_share(arguments.task_index, arguments.num_tasks, os.environ)
    try:
        with _stoppable("run"):
            if arguments.redo:
                redo(plan, arguments.redo)
            with _progress(arguments.out):
                funnel = run(plan, arguments.until, index, count)
    except WorkError as error:
        print(f"gve synth run: failed: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(funnel))
        return 0
    _print_funnel(funnel)
    if funnel["steps"] and funnel["steps"][-1]["step"] == "output":
        print(f"shards: {arguments.out / 'shards'} (its README.md is the data card)")
    return 0


@contextmanager
def _stoppable(command: str) -> Iterator[None]:
    """Ends the block by exit code 85 on SIGTERM or SIGUSR1, and says so."""
    stopped = False

    def stop(*_: Any) -> None:
        nonlocal stopped
        stopped = True
        sys.exit(STOPPED)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if stopped:
            print(f"gve synth {command}: stopped; the same command goes on", file=sys.stderr)


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


def _audit(arguments: argparse.Namespace) -> int:
    from gve.encode.encoder import progress_bar
    from gve.synth.audit.contamination import Thresholds
    from gve.synth.audit.page import PAGE, write_page
    from gve.synth.audit.run import FOLDER, AuditOptions, audit

    options = AuditOptions(
        sample=arguments.sample,
        seed=arguments.seed,
        uvrb=tuple(arguments.uvrb),
        thresholds=Thresholds(arguments.ngram, arguments.min_words, arguments.max_bits),
        videos=not arguments.texts_only,
        exclude=arguments.exclude,
        jobs=arguments.jobs,
    )
    if arguments.exclude and not arguments.uvrb:
        raise InputError("--exclude is what is shared with a benchmark: name its folder by --uvrb")
    judge = _judge(arguments)
    page = arguments.html or arguments.out / FOLDER / PAGE
    try:
        with _stoppable("audit"):
            found = audit(arguments.out, options, judge, progress_bar)
            with progress_bar("page", 1) as advance:
                write_page(page, found, options.jobs)
                advance(1)
    except OSError as error:
        print(f"gve synth audit: failed: {error}", file=sys.stderr)
        return 1
    judged = found.report.get("judge")
    if arguments.json:
        print(json.dumps({**found.report, "page": str(page)}))
    else:
        _print_audit(found.report, page)
    if judged and not judged["judged"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in judged["failed"].items())
        print(f"gve synth audit: failed: the judge gave no valid reply ({reasons})", file=sys.stderr)
        return 1
    return 0


def _judge(arguments: argparse.Namespace) -> Any:
    """What makes the judge; None where none is named."""
    import yaml

    from gve.synth.config import make_captioner, read_config

    if arguments.judge and arguments.config:
        raise InputError("give --judge or --config, not both")
    if arguments.config:
        section = read_config(arguments.config).get("judge")
        if not section:
            raise InputError(f"{arguments.config} has no section `judge` with a kind")
    elif arguments.judge:
        kind, *changes = arguments.judge
        section = {"kind": kind}
        for change in changes:
            key, given, value = change.partition("=")
            if not given:
                raise InputError(f"--judge {kind} {change}: write key=value")
            section[key] = yaml.safe_load(value)
    else:
        return None
    if section.get("kind") == "embedded":
        raise InputError(f"the tiny base follows no prompt and cannot judge: use {', '.join(JUDGES)}, or module:Class")
    return make_captioner(section, JUDGES, "judge")


def _print_audit(report: Mapping[str, Any], page: Path) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    census = report["census"]
    print(f"{census['videos']:,} videos, {census['captions']:,} captions by {report['captioner'] or 'nobody named'}")
    if report["open_steps"]:
        print(f"not finished: {', '.join(report['open_steps'])}; the audit is of what is there")
    for key, counts in (("profiles", census["profiles"]), ("tasks", report["tasks"])):
        own = (
            f"{name} {row['share']:.3f} of {row['asked']:.3f}"
            if "share" in row
            else f"{name} {row['made']} of {row['asked']}"
            for name, row in counts.items()
        )
        print(f"{key} of what was asked: {', '.join(own)}")
    if judged := report.get("judge"):
        table = Table(Column("claims", no_wrap=True), "false", "decided", "cannot tell", "rate", "95% interval")
        for name, row in (("all", judged["all"]), *judged["by_kind"].items()):
            shown = row["value"] is not None
            table.add_row(
                name,
                *(f"{row[key]:,}" for key in ("false", "decided", "untold")),
                f"{row['value']:.3f}" if shown else "",
                f"[{row['low']:.3f}, {row['high']:.3f}]" if shown else "",
            )
        console.print(table)
        lost = ", ".join(f"{count} {reason}" for reason, count in judged["failed"].items())
        print(f"{judged['judged']} captions judged by {judged['judge']}" + (f"; not judged: {lost}" if lost else ""))
    if shared := report.get("contamination"):
        reasons = ", ".join(f"{count} {reason}" for reason, count in shared["by_reason"].items())
        print(f"{shared['excluded']} of {shared['videos']} videos are on {shared['list']} ({reasons})")
    print(f"page: {page}")


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
