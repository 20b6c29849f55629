"""`gve toy`: make the toy world, or look at it."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gve.items import InputError


def main(argv: Sequence[str]) -> int:
    """Run `gve toy make` or `gve toy show`.

    Returns:
        0 done, 2 bad input.
    """
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except InputError as error:
        print(f"gve toy: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gve toy", description="A small world of rendered clips with true captions.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    make = commands.add_parser(
        "make",
        help="write base, shards and mini UVRB to a folder",
        description="Write a tiny base, training shards of all 13 tasks and a mini UVRB; an equal world is reused.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    make.add_argument("out", type=Path, help="folder of the world")
    make.add_argument("--seed", type=int, default=0, help="of scenes, words and weights")
    make.add_argument("--scale", type=float, default=1.0, help="share of the training mixture of about 10,000 pairs")
    make.add_argument("--test-scale", type=float, default=1.0, help="share of the test sets' sizes, at most 1")
    make.add_argument("--dialect", default="A", help="of the test sets: A (trained) or B (transfer)")
    make.add_argument("--jobs", type=int, default=2, help="processes that render")
    make.add_argument("--quiet", action="store_true", help="no progress bar")
    make.set_defaults(run=_make)
    show = commands.add_parser(
        "show",
        help="draw a contact sheet of a world's test sets",
        description="Write a PNG: per test set some queries, each above the eight sampled frames of a positive.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    show.add_argument("world", type=Path, help="folder made by `gve toy make`")
    show.add_argument("png", type=Path, help="picture to write")
    show.add_argument("--per-set", type=int, default=2, help="queries of each set")
    show.set_defaults(run=_show)
    return parser


def _make(arguments: argparse.Namespace) -> int:
    from gve.toy.world import Request, make_world

    if arguments.jobs < 1:
        raise InputError(f"--jobs {arguments.jobs}: use 1 or more")
    request = Request(arguments.seed, arguments.scale, arguments.test_scale, arguments.dialect)
    start = time.monotonic()
    out = make_world(arguments.out, request, jobs=arguments.jobs, progress=not arguments.quiet)
    made = json.loads((out / "world.json").read_text())
    pairs = sum(source["pairs"] for source in made["shards"].values())
    queries = sum(notes["queries"] for notes in made["uvrb"].values())
    took = time.monotonic() - start
    print(f"{out}: {pairs} training pairs, {len(made['uvrb'])} test sets with {queries} queries ({took:.0f} s)")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from gve.toy.sheet import contact_sheet

    if not (arguments.world / "world.json").is_file():
        raise InputError(f"{arguments.world} is no toy world; make one with `gve toy make {arguments.world}`")
    contact_sheet(arguments.world, arguments.per_set).save(arguments.png)
    print(arguments.png)
    return 0
