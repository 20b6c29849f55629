"""`gve uvrb list | prepare | check`: what the benchmark is, how it comes onto this disk, and whether it is whole."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from gve.encode.support import SUPPORT
from gve.eval.classification import CLASSIFICATION, LABEL_TEXT
from gve.eval.records import SETS, SetRecord
from gve.eval.uvrb import UVRBReader, find_record
from gve.items import InputError

SHOWN = 5  # findings of one kind that the table names; --json has all


def add_parsers(commands: Any) -> None:
    """Adds `list`, `prepare` and `check`."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    new = commands.add_parser("list", help="the 16 sets and 5 classification sets: what, how many, licence, where from")
    new.add_argument("--models", action="store_true", help="the 16 published models instead: which run here, and how")
    new.set_defaults(handler=_list)
    make = commands.add_parser(
        "prepare",
        formatter_class=formatter,
        help="build sets from the original files of their sources",
        description="Writes sets in the released layout. Clips are linked, never copied or downloaded; frames that are "
        "cut, long videos that are joined and clips that lie in tar files are made below ROOT, once. The released "
        "UVRB needs no preparation: point `check` and `run` at it.",
    )
    make.add_argument("--root", required=True, help="folder of the sets; made where it is not there")
    make.add_argument("--set", nargs="+", required=True, dest="sets", metavar="NAME", help="sets to build")
    make.add_argument(
        "--from", dest="source", metavar="DIR", help="annotation files of the source: a folder, or one file"
    )
    make.add_argument(
        "--media", metavar="DIR", help="folder with the clips, at any depth; that of --from when not given"
    )
    make.add_argument("--download", action="store_true", help="fetch annotation files, where the licence permits it")
    make.add_argument("--seed", type=int, default=0, help="of the frames of MSRVTT-I2V and the clips of LoVR-C2V")
    make.add_argument("--joiner", default=", ", help="between the keywords of PEV-K")
    make.add_argument(
        "--label-text", default=LABEL_TEXT, help="text of a label in classification, e.g. a video of {name}"
    )
    make.add_argument("--split", type=int, choices=(1, 2, 3), default=1, help="list of UCF101 and HMDB51")
    make.add_argument("--skip-missing", action="store_true", help="classification: leave out clips that are not there")
    make.add_argument("--replace", action="store_true", help="write over a set that prepare did not make")
    make.add_argument("--jobs", type=int, default=2, help="files worked on side by side")
    make.set_defaults(handler=_prepare)
    look = commands.add_parser(
        "check",
        formatter_class=formatter,
        help="files that are missing, unreadable or double, and counts against the published ones",
        description="Exits with 1 when something is wrong. Verdicts of files are kept in ROOT/check.jsonl, so that an "
        "interrupted check goes on.",
    )
    look.add_argument("--root", required=True, help="folder of the sets")
    look.add_argument("--set", nargs="+", dest="sets", metavar="NAME", help="sets to check; all that are there")
    look.add_argument("--no-decode", action="store_true", help="do not open the media files: seconds instead of hours")
    look.add_argument("--no-counts", action="store_true", help="a stand-in such as the toy world: no published numbers")
    look.add_argument("--min-frames", type=int, default=8, help="a clip with fewer frames is noted")
    look.add_argument("--timeout", type=float, default=120.0, help="the longest one file may take, in seconds")
    look.add_argument("--jobs", type=int, default=2, help="files opened side by side")
    look.set_defaults(handler=_check)
    for command in (new, make, look):
        command.add_argument("--json", action="store_true", help="print the result as JSON")


def _list(arguments: argparse.Namespace) -> int:
    if arguments.models:
        return _list_models(as_json=arguments.json)
    records = (*SETS, *CLASSIFICATION)
    if arguments.json:
        print(json.dumps({record.name: _described(record) for record in records}, indent=1))
        return 0
    table = Table(
        Column("set", no_wrap=True), "ability", "query", "queries", "corpus", "s", "words", "metric", "licence"
    )
    for record in records:
        if record is CLASSIFICATION[0]:
            table.add_section()
        table.add_row(
            record.name,
            record.ability or "-",
            record.query,
            f"{record.num_queries:,}",
            f"{record.num_corpus} a query" if record.pooled else f"{record.num_corpus:,}",
            f"{record.seconds:g}" if record.seconds else "-",
            f"{record.words:g}" if record.words else "-",
            record.metric_label,
            record.licence,
        )
    console = _console()
    console.print(table)
    console.print(
        "s: mean length of a clip in seconds; words: mean words of a query text. Classification: clips ask for"
    )
    console.print(
        "labels; it enters no average of UVRB. Everything at once: Hugging Face data set Alibaba-NLP/UVRB, about"
    )
    console.print("490 GB, read as it is. One by one, for `gve uvrb prepare`:")
    sources = {record.source.name: record.source for record in records}
    for source in sources.values():
        names = ", ".join(record.name for record in records if record.source is source)
        console.print(f"  {source.name} ({names}): {source.obtain}", soft_wrap=True, markup=False, highlight=False)
    return 0


def _list_models(as_json: bool) -> int:
    if as_json:
        print(json.dumps([own.to_dict() for own in SUPPORT], indent=1))
        return 0
    table = Table(Column("model", no_wrap=True), Column("weights", no_wrap=True), "adapter", "note")
    for own in SUPPORT:
        table.add_row(own.model, own.hub, own.adapter or "-", own.note)
    _console().print(table)
    return 0


def _described(record: SetRecord) -> dict[str, Any]:
    source = record.source
    return {
        "ability": record.ability,
        "query": record.query,
        "queries": record.num_queries,
        "corpus": record.num_corpus,
        "pooled": record.pooled,
        "seconds": record.seconds,
        "words": record.words,
        "metric": record.metric,
        "instruction": record.instruction,
        "built_from": f"{source.name}: {record.built_from}",
        "licence": record.licence,
        "obtain": source.obtain,
        "download": not source.terms and bool(source.files),
    }


def _prepare(arguments: argparse.Namespace) -> int:
    from gve.eval.builders import Options, prepare
    from gve.eval.builders.hub import download

    if not arguments.source and not arguments.download:
        raise InputError("name the folder with the annotation files by --from; `gve uvrb list` says what to get")
    if arguments.source and arguments.download:
        raise InputError("--from and --download exclude each other: take the files that are there, or fetch them")
    options = Options(
        seed=arguments.seed,
        joiner=arguments.joiner,
        label_text=arguments.label_text,
        split=arguments.split,
        skip_missing=arguments.skip_missing,
        replace=arguments.replace,
        jobs=max(1, arguments.jobs),
    )
    records = [find_record(name) for name in arguments.sets]  # all names first: no half of the work for a slip
    done = {}
    with _progress() as progress:
        for record in records:
            source = arguments.source or download(
                record.source, Path(arguments.root) / "annotations" / record.source.name
            )
            done[record.name] = prepare(
                record.name, arguments.root, source, media=arguments.media, options=options, progress=progress
            )
    failed = sum(len(prepared.failed) for prepared in done.values())
    if arguments.json:
        shown = {
            name: {**prepared.facts, "absent": list(prepared.absent), "failed": prepared.failed}
            for name, prepared in done.items()
        }
        print(json.dumps(shown))
        return 1 if failed else 0
    for name, prepared in done.items():
        counts = prepared.facts["counts"]
        print(f"{name}: {counts['queries']:,} queries, {counts['corpus']:,} in the corpus")
        for deviation in prepared.facts["deviations"]:
            print(f"  deviates: {deviation}")
        if prepared.absent:
            print(f"  {len(prepared.absent):,} clips are not on the disk, {prepared.absent[0]} for one; pass --media")
        for file, reason in list(prepared.failed.items())[:SHOWN]:
            print(f"  failed: {file}: {reason}")
        if len(prepared.failed) > SHOWN:
            print(f"  failed: {len(prepared.failed) - SHOWN} more; --json names all")
    return 1 if failed else 0


def _check(arguments: argparse.Namespace) -> int:
    from gve.eval.check import MediaInspector, check_sets

    reader = UVRBReader(arguments.root)
    names = [find_record(name).name for name in arguments.sets or ()] or reader.names((*SETS, *CLASSIFICATION))
    with _progress() as progress:
        checks = check_sets(
            reader.root,
            names,
            decode=not arguments.no_decode,
            counts=not arguments.no_counts,
            min_frames=arguments.min_frames,
            inspector=MediaInspector(reader.root, max(1, arguments.jobs), arguments.timeout),
            progress=progress,
        )
    wrong = sum(len(check.wrong) for check in checks)
    absent = [] if arguments.sets else [record.name for record in SETS if record.name not in names]
    if arguments.json:
        shown = {"wrong": wrong, "absent": absent, "sets": {check.name: check.as_json() for check in checks}}
        print(json.dumps(shown, indent=1))
        return 1 if wrong else 0
    table = Table(Column("set", no_wrap=True), "queries", "corpus", "s", "words", "wrong", "noted")
    for check in checks:
        known = find_record(check.name)
        kinds = [Counter(f.kind for f in check.findings if f.wrong is wrong_one) for wrong_one in (True, False)]
        table.add_row(
            check.name,
            f"{check.queries:,} of {known.num_queries:,}",
            f"{check.corpus:,}" + ("" if known.pooled else f" of {known.num_corpus:,}"),
            f"{check.seconds:.1f}" if check.seconds else "-",
            f"{check.words:.1f}" if check.words else "-",
            *(", ".join(f"{count:,} {kind}" for kind, count in found.most_common()) or "-" for found in kinds),
        )
    _console().print(table)
    for check in checks:
        for kind in dict.fromkeys(finding.kind for finding in check.findings):
            findings = [finding for finding in check.findings if finding.kind == kind]
            for finding in findings[:SHOWN]:
                print(f"{check.name}: {kind}: {finding.what}: {finding.detail}")
            if len(findings) > SHOWN:
                print(f"{check.name}: {kind}: {len(findings) - SHOWN:,} more; --json names all")
    if absent:
        print(f"not there: {', '.join(absent)}")
    print(f"{wrong:,} problem(s)" if wrong else "nothing is wrong")
    return 1 if wrong else 0


def _console() -> Console:
    # Rich takes 80 columns for a pipe or a log file, which would cut the columns.
    return Console(width=None if sys.stdout.isatty() else 140)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr, fed with (what, done, all)."""
    columns: tuple[Any, ...] = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def update(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield update
