"""`gve shards build | check | stats | mixture`."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from gve.data.build import REJECTS, BadRows, BuildOptions, build, check, stats
from gve.data.exclusion import CONTAMINATED, read_exclusions
from gve.data.manifest import Presample
from gve.data.mixture import PUBLISHED_TOTALS, MixtureRow, mixture, summary, totals
from gve.data.readers import READERS, Limited, Reader, ReaderOptions, open_reader
from gve.items import InputError
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
        usage="gve shards build LISTING OUT [...] | gve shards build --reader NAME --from DIR --source NAME --root OUT",
        help="verify the files of a listing or of a published data set and write them as shards",
        description="Writes all rows of a listing or data set, or none. Every file is decoded before it is stored.",
    )
    new.add_argument(
        "listing", nargs="?", help='jsonl of {"query": {"text" | "image" | "video": ...}, "target": {...}, ...}, or csv'
    )
    new.add_argument("out", nargs="?", help="shard folder; sources that are there stay")
    new.add_argument("--reader", default="listing", choices=("listing", *READERS), help="layout of what is read")
    new.add_argument("--from", dest="folder", help="local copy of the data set; the listing where no reader is named")
    new.add_argument("--root", help="the same as OUT")
    new.add_argument(
        "--source",
        default="",
        help="name of the source where rows give none, else the listing's name; a name of `gve shards mixture` brings "
        "its task, instruction and hard negatives along",
    )
    new.add_argument("--limit", help="rows of the data set, drawn alike from all; 3b or 7b: as many as published")
    new.add_argument("--media", help="folder of the clips or pictures; each reader has its own default")
    new.add_argument("--media-name", default="", help="name of a clip's file with the fields of its row in braces")
    new.add_argument("--drop-list", help="file with a clip key or video id a line to leave out (internvid)")
    new.add_argument(
        "--exclude", type=Path, help="exclusion list of `gve synth audit`: rows with an id of it are left out"
    )
    new.add_argument("--negatives", type=int, help="hard negatives kept per row, where the data set has some (mbeir)")
    new.add_argument("--seed", type=int, default=42, help="of the choices among rows, captions and positives")
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
    rows = commands.add_parser("mixture", help="the 38 training sources as published: sizes, batch, negatives, readers")
    rows.set_defaults(run=_mixture)
    for command in (look, count, rows):
        command.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _build(arguments: argparse.Namespace) -> int:
    presample = None
    if arguments.presample:
        sampling = Sampling.parse(arguments.presample)
        presample = Presample(sampling, arguments.presample_px, arguments.jpeg_quality)
    listing, out = arguments.folder or arguments.listing, arguments.root or arguments.out
    if arguments.folder and arguments.listing:  # the only place that is left is the shard folder
        out = arguments.root or arguments.listing
    if not listing or not out:
        raise InputError("give what is read and the shard folder: LISTING OUT, or --from DIR --root OUT")
    known = mixture().get(arguments.source)
    options = BuildOptions(
        source=arguments.source,
        task=arguments.task,
        level=arguments.level,
        instruction=arguments.instruction or (known.instruction if known else ""),
        presample=presample,
        skip_bad=arguments.on_bad == "skip",
        min_frames=arguments.min_frames,
        min_side_px=arguments.min_side_px,
        max_words=arguments.max_words,
        samples_per_shard=arguments.samples_per_shard,
        replace=arguments.replace,
        jobs=max(1, arguments.jobs),
        exclude=read_exclusions(arguments.exclude) if arguments.exclude else frozenset(),
    )
    rows = listing if arguments.reader == "listing" else _reader(arguments, Path(listing), known)
    try:
        with _progress("rows") as progress:
            result = build(rows, out, options, progress)
    except BadRows as error:
        for line in error.lines if len(error.lines) > 1 else ():
            print(f"gve shards build: {line}", file=sys.stderr)
        raise
    if options.exclude and not result.dropped[CONTAMINATED]:
        print(f"gve shards build: no row has an id of {arguments.exclude}: are they of this source?", file=sys.stderr)
    if arguments.json:
        counts = {"samples": result.samples, "rejected": result.rejected, "dropped": result.dropped}
        print(json.dumps({name: dict(count) for name, count in counts.items()}))
        return 0
    for source, count in result.samples.items():
        print(f"{source}: {count} samples")
    for name, rejected in (("left out by rule", result.dropped), ("rejected", result.rejected)):
        if rejected:
            reasons = ", ".join(f"{count} {reason}" for reason, count in rejected.most_common())
            print(f"{name}: {reasons}" + (f" (see {out}/{REJECTS})" if rejected is result.rejected else ""))
    return 0


def _reader(arguments: argparse.Namespace, folder: Path, known: MixtureRow | None) -> Reader:
    """The reader of a published data set; what the mixture says about its source holds where no option does."""
    if not arguments.source:
        raise InputError("name the training source by --source; `gve shards mixture` lists the published ones")
    negatives = arguments.negatives if arguments.negatives is not None else known.negatives if known else 0
    reader: Reader = open_reader(
        arguments.reader,
        ReaderOptions(
            folder,
            arguments.source,
            task=arguments.task or (known.task if known else ""),
            media=Path(arguments.media) if arguments.media else None,
            media_name=arguments.media_name,
            drop_list=Path(arguments.drop_list) if arguments.drop_list else None,
            negatives=negatives,
            seed=arguments.seed,
        ),
    )
    if arguments.limit in ("3b", "7b"):
        if known is None:
            raise InputError(f"--limit {arguments.limit}: {arguments.source} is no source of `gve shards mixture`")
        return Limited(reader, known.size(arguments.limit), arguments.seed)
    if arguments.limit is not None:
        if not arguments.limit.isdigit():
            raise InputError(f"--limit {arguments.limit}: give a number of rows, 3b or 7b")
        return Limited(reader, int(arguments.limit), arguments.seed)
    return reader


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


def _mixture(arguments: argparse.Namespace) -> int:
    if arguments.json:
        print(json.dumps(summary()))
        return 0
    columns = ("task", "level", "3B", "7B", "negatives", "batch", "global", "reader")
    table = Table(Column("source", no_wrap=True), *columns)
    for row in mixture().values():
        numbers = (f"{row.size_3b:,}", f"{row.size_7b:,}", row.negatives, row.batch, row.global_batch)
        table.add_row(row.name, row.task, str(row.level), *map(str, numbers), row.reader)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    for kind, (small, large) in totals(list(mixture().values())).items():
        said = PUBLISHED_TOTALS[kind]
        # The published totals are rounded to 10 K.
        verdict = (
            "equal when rounded" if max(abs(small - said[0]), abs(large - said[1])) <= 5000 else "the rows disagree"
        )
        print(f"{kind}: {small:,} (3B) / {large:,} (7B); the paper prints {said[0]:,} / {said[1]:,}: {verdict}")
    print("Where to get each source, its licence, its instruction and notes: --json")
    return 0


@contextmanager
def _progress(unit: str) -> Iterator[Callable[[int, int | None], None]]:
    """A progress bar on stderr, fed with (done, total or None)."""
    columns: tuple[Any, ...] = (TextColumn(unit), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(unit, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
