"""`gve sweep run | status | collect | compare`."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from gve.items import InputError
from gve.sweep.crew import Crew, Site, WorkError, command_line, make_worlds, write_overlay
from gve.sweep.plan import Run, Sweep, machine_values, read_sweep, share
from gve.synth_cli import slurm_share

WIDTH = 140  # columns of tables where the output is no terminal


def main(argv: Sequence[str]) -> int:
    """Runs one of the commands.

    Args:
        argv: the words after `gve sweep`.

    Returns:
        0 done, 1 a run failed, 85 asked to stop (SIGTERM, SIGUSR1, Ctrl-C): the same command goes on.

    Raises:
        InputError: the input cannot be used.
    """
    arguments = _parser().parse_args(argv)
    return int(arguments.handler(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gve sweep", description="Many runs from one file (experiments/<NNNN-slug>/sweep.yaml), and their table."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    formatter = argparse.ArgumentDefaultsHelpFormatter
    run = commands.add_parser(
        "run",
        formatter_class=formatter,
        help="do the runs of a sweep",
        description="Does every run that is not done yet: fit and validate of each cell and seed, each in a folder of "
        "its own below OUT/<sweep>. A run that fails stops no other. The same command goes on where it was "
        "interrupted, tries failed runs again and does nothing when all is done.",
    )
    _common(run)
    run.add_argument("--jobs", type=int, default=1, help="processes at a time on this machine")
    run.add_argument("--only", nargs="+", default=[], metavar="CELL", help="cells to run, with those they need; all")
    run.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        dest="values",
        help="values of this machine, no part of a run's id: data.root=SHARDS uvrb.root=UVRB trainer.devices=8",
    )
    run.add_argument(
        "--launch", default="", metavar="WORDS", help='put before the command of each step, such as "srun --nodes 4"'
    )
    run.add_argument(
        "--task-index", type=int, help="which of several commands this is, from 0; of a SLURM array when not given"
    )
    run.add_argument("--num-tasks", type=int, help="how many commands share the runs; of a SLURM array when not given")
    run.add_argument("--dry-run", action="store_true", help="print the commands, do nothing")
    run.set_defaults(handler=_run)
    status = commands.add_parser(
        "status", formatter_class=formatter, help="which runs are done, failed or missing", description="Reads only."
    )
    _common(status)
    status.add_argument("--json", action="store_true", help="print the rows as JSON")
    status.set_defaults(handler=_status)
    collect = commands.add_parser(
        "collect",
        formatter_class=formatter,
        help="write results.csv",
        description="Makes results.csv anew from the run folders: a row for every result; failed, missing and damaged "
        "runs have a row with the reason. Exit 1 when a run is not done.",
    )
    _common(collect)
    collect.add_argument("--to", type=Path, help="file to write; OUT/<sweep>/results.csv when not given")
    collect.set_defaults(handler=_collect)
    compare = commands.add_parser(
        "compare",
        formatter_class=formatter,
        help="every cell against the baseline of the file, paired by seed",
        description="Prints Markdown: the arms, and for each against the file's baseline the difference paired by "
        "seed, its 95% interval over seeds, Holm's p over the arms, and the least difference that these seeds detect.",
    )
    _common(compare)
    compare.add_argument("--results", type=Path, help="results.csv to read; the run folders when not given")
    compare.add_argument("--scores", nargs="+", default=["AVG-A"], metavar="NAME", help="averages, abilities, sets")
    compare.add_argument("--setting", default="", help="of the step uvrb, such as f16-t200; empty: gve validate")
    compare.add_argument("--baseline", default="", help="another cell to compare with; the file's when not given")
    compare.set_defaults(handler=_compare)
    return parser


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="sweep file, or its folder")
    parser.add_argument("--toy", action="store_true", help="toy size: the part `toy` of the file")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of all sweeps and toy worlds")


def _run(arguments: argparse.Namespace) -> int:
    sweep = read_sweep(arguments.file, toy=arguments.toy)
    site = Site(arguments.out, machine_values(arguments.values), tuple(shlex.split(arguments.launch)))
    if arguments.jobs < 1:
        raise InputError(f"--jobs {arguments.jobs}: use 1 or more")
    index, count = slurm_share(arguments.task_index, arguments.num_tasks, os.environ)
    if not 0 <= index < count:
        raise InputError(f"--task-index {index} of --num-tasks {count}: it counts from 0")
    runs = share(sweep.runs(arguments.only), index, count)
    if arguments.dry_run:
        _print_plan(sweep, runs, site)
        return 0
    _check(runs, site)
    crew = Crew(site, arguments.jobs, say=_say)
    previous = {number: signal.signal(number, crew.stop) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        make_worlds([run.cell.world for run in runs if run.cell.world], site, _say)
        outcome = crew.work(runs)
    except WorkError as error:
        print(f"gve sweep run: failed: {error}", file=sys.stderr)
        return 1
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    counts = {"done": len(outcome.done), "failed": len(outcome.failed), "stopped": len(outcome.stopped)}
    counts["elsewhere"] = len(outcome.elsewhere)
    _say(f"{sweep.name}: {', '.join(f'{number} {name}' for name, number in counts.items() if number)} of {len(runs)}")
    for name, reason in outcome.failed.items():
        print(f"gve sweep run: failed: {name}: {reason}", file=sys.stderr)
    return outcome.code


def _check(runs: Sequence[Run], site: Site) -> None:
    """Refuses a configuration that does not parse before hours of others have run."""
    from gve.lightning_cli import resolve

    seen = set()
    for run in runs:
        overlay = write_overlay(run, site)
        if run.cell.name in seen or not {"fit", "validate"} & set(run.cell.steps):
            continue
        seen.add(run.cell.name)
        try:
            resolve(["fit", *(word for path in (*run.cell.configs, overlay) for word in ("--config", str(path)))])
        except InputError as error:
            raise InputError(f"cell {run.cell.name}: {error}") from None


def _print_plan(sweep: Sweep, runs: Sequence[Run], site: Site) -> None:
    cells = dict.fromkeys(run.cell.name for run in runs)
    print(f"# {sweep.name}: {len(runs)} runs of {len(cells)} cells in {site.out / sweep.name}")
    for world in dict.fromkeys(run.cell.world for run in runs if run.cell.world):
        print(command_line(world.words(site.world(world))))
    for run in runs:
        print(f"# {run.id}; overlay.yaml: {json.dumps(site.overlay(run))}")
        for step in run.cell.steps:
            print(command_line(site.words(run, step), site.launch))


def _status(arguments: argparse.Namespace) -> int:
    from gve.sweep.collect import collect

    sweep = read_sweep(arguments.file, toy=arguments.toy)
    site = Site(arguments.out)
    rows = collect(sweep, site)
    if arguments.json:
        print(json.dumps([row.facts | row.scores for row in rows]))
        return 0
    counts: dict[str, Counter[str]] = {cell.name: Counter() for cell in sweep.cells}
    seconds: dict[str, float] = dict.fromkeys(counts, 0.0)
    seen: set[str] = set()
    for row in rows:
        if row.facts["run"] not in seen:
            seen.add(row.facts["run"])
            counts[row.cell][row.facts["state"]] += 1
            seconds[row.cell] += sum(float(row.facts[f"seconds_{step}"] or 0) for step in ("fit", "validate", "uvrb"))
    table = Table(title=f"{sweep.name}: {len(sweep.seeds)} seeds", title_justify="left")
    for place, head in enumerate(("cell", "done", "failed", "missing", "seconds", "note")):
        table.add_column(head, justify="right" if 0 < place < 5 else "left")
    for cell in sweep.cells:
        states = [str(counts[cell.name][state]) for state in ("done", "failed", "missing")]
        table.add_row(cell.name, *states, f"{seconds[cell.name]:.0f}", cell.note)
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    console.print(table)
    for row in rows:
        if row.facts["state"] == "failed":
            console.print(f"{row.facts['run']}: {row.facts['reason']}", markup=False)
    folder = site.out / sweep.name
    kept = {run.id for run in sweep.runs()}
    others = [path.name for path in folder.iterdir() if (path / "sweep.json").is_file()] if folder.is_dir() else []
    if others := [name for name in others if name not in kept]:
        console.print(f"{len(others)} folders of earlier configurations, {others[0]} among them", markup=False)
    return 0


def _collect(arguments: argparse.Namespace) -> int:
    from gve.sweep.collect import collect, write_results

    sweep = read_sweep(arguments.file, toy=arguments.toy)
    site = Site(arguments.out)
    rows = collect(sweep, site)
    path = arguments.to or site.out / sweep.name / "results.csv"
    write_results(path, rows)
    undone = [row for row in rows if not row.done]
    print(f"{path}: {len(rows)} rows, {len(rows) - len(undone)} done")
    for row in undone:
        print(f"gve sweep collect: {row.facts['state']}: {row.facts['run']}: {row.facts['reason']}", file=sys.stderr)
    return 1 if undone else 0


def _compare(arguments: argparse.Namespace) -> int:
    from gve.sweep.collect import METRICS, collect, read_table
    from gve.sweep.tables import against, arm_lines, comparison_lines, undone

    sweep = read_sweep(arguments.file, toy=arguments.toy)
    baseline = arguments.baseline or sweep.baseline
    if not baseline:
        raise InputError(f"{arguments.file} names no baseline; give --baseline CELL")
    if unknown := [name for name in arguments.scores if name not in METRICS]:
        raise InputError(f"--scores {', '.join(unknown)}: use {', '.join(METRICS)}")
    rows = read_table(arguments.results) if arguments.results else collect(sweep, Site(arguments.out))
    pairs = against(rows, baseline, arguments.setting)
    # One family for each score: the arms are what is chosen among.
    families = [[name] for name in arguments.scores]
    lines = arm_lines(rows, arguments.scores, arguments.setting)
    lines += ["", *comparison_lines(rows, pairs, families, arguments.setting)]
    print("\n".join(lines))
    for name, reason in undone(rows).items():
        print(f"gve sweep compare: no result: {name}: {reason}", file=sys.stderr)
    return 0


def _say(line: str) -> None:
    print(line, flush=True)
