"""`gve shards build | check | stats`."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from gve.data.build import REJECTS, BadRows, BuildOptions, build, check, stats
from gve.data.manifest import Presample
from gve.video import Sampling


def main(argv: Sequence[str]) -> int:
    """Runs one of the commands.

    Args:
        argv: the words after `gve shards`.

    Returns:
        0 done, 1 the work failed (or `check` found problems), 2 the input cannot be used.
    """
    arguments = _parser().parse_args(argv)
    # A terminated build must run its clean-up as an interrupted one does.
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return arguments.run(arguments)
    except OSError as error:
        print(f"gve shards {arguments.command}: failed: {error}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, previous)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gve shards", description="WebDataset shards of training pairs.")
    commands = parser.add_subparsers(dest="command", required=True)
    formatter = argparse.ArgumentDefaultsHelpFormatter
    new = commands.add_parser(
        "build",
        formatter_class=formatter,
        help="verify the files of a listing and write them as shards",
        description="Writes all rows of a listing, or none. Every file is decoded before it is stored.",
    )
    new.add_argument(
        "listing", help='jsonl of {"query": {"text" | "image" | "video": ...}, "target": {...}, ...}, or csv'
    )
    new.add_argument("out", help="shard folder; sources that are there stay")
    new.add_argument("--source", default="", help="name of the source where rows give none; else the listing's name")
    new.add_argument("--task", default="", help="modality task, for example T2V; derived from the rows when not given")
    new.add_argument("--level", type=int, choices=(1, 2, 3), help="pyramid level; derived from the task when not given")
    new.add_argument("--instruction", default="", help="query instruction where rows give none")
    new.add_argument("--presample", help="store frames instead of videos: uniform(8), fps(1,8), ...")
    new.add_argument("--presample-px", type=int, default=0, help="most pixels of a stored frame; 0 keeps its size")
    new.add_argument("--jpeg-quality", type=int, default=95, help="of stored frames, 1 to 100")
    new.add_argument("--on-bad", choices=("fail", "skip"), default="fail", help="what a row that cannot be used does")
    new.add_argument("--min-frames", type=int, default=2, help="fewest frames of a clip")
    new.add_argument("--min-side-px", type=int, default=2, help="smallest height and width in pixels")
    new.add_argument("--max-words", type=int, default=20_000, help="longest text, in words")
    new.add_argument("--samples-per-shard", type=int, default=1000, help="at most 10000")
    new.add_argument("--replace", action="store_true", help="take the place of a source of the same name")
    new.add_argument("--jobs", type=int, default=2, help="files decoded side by side")
    new.add_argument("--json", action="store_true", help="print the result as JSON")
    new.set_defaults(run=_build)
    look = commands.add_parser("check", help="compare every byte of a shard folder with its indexes and manifest")
    look.set_defaults(run=_check)
    count = commands.add_parser("stats", help="samples, bytes and distinct contents by source, task and level")
    count.set_defaults(run=_stats)
    for command in (look, count):
        command.add_argument("root", help="shard folder")
        command.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _build(arguments: argparse.Namespace) -> int:
    presample = None
    if arguments.presample:
        sampling = Sampling.parse(arguments.presample)
        presample = Presample(sampling, arguments.presample_px, arguments.jpeg_quality)
    options = BuildOptions(
        source=arguments.source,
        task=arguments.task,
        level=arguments.level,
        instruction=arguments.instruction,
        presample=presample,
        skip_bad=arguments.on_bad == "skip",
        min_frames=arguments.min_frames,
        min_side_px=arguments.min_side_px,
        max_words=arguments.max_words,
        samples_per_shard=arguments.samples_per_shard,
        replace=arguments.replace,
        jobs=max(1, arguments.jobs),
    )
    try:
        with _progress("rows") as progress:
            result = build(arguments.listing, arguments.out, options, progress)
    except BadRows as error:
        for line in error.lines if len(error.lines) > 1 else ():
            print(f"gve shards build: {line}", file=sys.stderr)
        raise
    if arguments.json:
        print(json.dumps({"samples": dict(result.samples), "rejected": dict(result.rejected)}))
        return 0
    for source, count in result.samples.items():
        print(f"{source}: {count} samples")
    if result.rejected:
        reasons = ", ".join(f"{count} {reason}" for reason, count in result.rejected.most_common())
        print(f"rejected: {reasons} (see {arguments.out}/{REJECTS})")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    with _progress("shards") as progress:
        problems = check(arguments.root, progress)
    if arguments.json:
        print(json.dumps({"problems": problems}))
    else:
        for problem in problems:
            print(problem)
        print(f"{len(problems)} problem(s)" if problems else "all shards match their indexes and the manifest")
    return 1 if problems else 0


def _stats(arguments: argparse.Namespace) -> int:
    numbers = stats(arguments.root)
    if arguments.json:
        print(json.dumps(numbers))
        return 0
    columns = ("task", "level", "samples", "shards", "queries", "targets", "presample")
    table = Table(Column("source", no_wrap=True), *columns, "MB")
    for name, row in numbers["sources"].items():
        table.add_row(name, *(str(row[column]) for column in columns), f"{row['bytes'] / 1e6:.1f}")
    # Rich takes 80 columns for a pipe or a log file, which would cut the headers off.
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    print(f"{numbers['samples']} samples, {numbers['bytes'] / 1e6:.1f} MB")
    return 0


@contextmanager
def _progress(unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, fed with (done, total)."""
    columns: tuple[Any, ...] = (TextColumn(unit), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(unit, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
