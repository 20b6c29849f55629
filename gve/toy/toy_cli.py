"""`gve toy`: make the toy world, look at it, plant faults in it, or make its tiny base again."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gve.items import InputError


def main(argv: Sequence[str]) -> int:
    """Runs `gve toy make`, `show`, `faults` or `base`.

    Returns:
        0.

    Raises:
        InputError: the input cannot be used.
    """
    arguments = _parser().parse_args(argv)
    return int(arguments.run(arguments))


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
    make.add_argument(
        "--base",
        default="trained",
        help="trained: the base that gve carries; random: the same architecture with random weights (--seed)",
    )
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
    faults = commands.add_parser(
        "faults",
        help="write weakly captioned clips with planted faults",
        description="Write a list of clips with weak captions, some of them spoiled in known ways: an input of "
        "`gve synth run`, whose filters can then be measured. truth.jsonl says what was planted; an equal pile is "
        "reused.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    faults.add_argument("out", type=Path, help="folder of the pile")
    faults.add_argument("--seed", type=int, default=0, help="of clips, words and faults")
    faults.add_argument("--rows", type=int, default=300, help="clips in the list")
    faults.add_argument("--share", type=float, default=0.4, help="share of the rows with a fault, 0 to 0.8")
    faults.add_argument("--faults", nargs="+", metavar="FAULT", help="which ones; all when not given")
    faults.add_argument("--quiet", action="store_true", help="no progress bar")
    faults.set_defaults(run=_faults)
    base = commands.add_parser(
        "base",
        help="train the tiny base that gve carries, anew",
        description="Pretrain the tiny base by next-token answers and captions; an interrupted run is continued.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    base.add_argument("out", type=Path, help="folder of the base, a hub folder when it is done")
    base.add_argument("--recipe", type=Path, required=True, help="YAML, as experiments/0001-toy-base/recipe.yaml")
    base.add_argument("--device", default="auto", help="cpu, cuda, or auto: cuda where there is one")
    base.add_argument("--threads", type=int, default=1, help="of the CPU")
    base.set_defaults(run=_base)
    return parser


def _make(arguments: argparse.Namespace) -> int:
    from gve.toy.world import Request, make_world

    if arguments.jobs < 1:
        raise InputError(f"--jobs {arguments.jobs}: use 1 or more")
    request = Request(arguments.seed, arguments.scale, arguments.test_scale, arguments.dialect, arguments.base)
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


def _faults(arguments: argparse.Namespace) -> int:
    from gve.toy.faults import FAULTS, PileRequest, make_pile, read_faults

    kinds = tuple(arguments.faults or FAULTS)
    request = PileRequest(arguments.seed, arguments.rows, arguments.share, kinds)
    rows = read_faults(make_pile(arguments.out, request, progress=not arguments.quiet))
    print(f"{arguments.out}: {len(rows)} rows, {request.each} of each of {len(kinds)} faults")
    return 0


def _base(arguments: argparse.Namespace) -> int:
    import torch
    import yaml
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from gve.toy.pretraining import Recipe, pretrain

    try:
        recipe = Recipe.from_dict(yaml.safe_load(arguments.recipe.read_text()))
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"recipe {arguments.recipe} cannot be read: {error}") from None
    device = "cuda" if arguments.device == "auto" and torch.cuda.is_available() else arguments.device
    torch.set_num_threads(max(1, arguments.threads))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("steps", total=recipe.steps)

        def report(line: dict[str, Any]) -> None:
            bar.update(task, completed=line["step"], description=f"loss {line['loss']:.3f}")

        pretrain(arguments.out, recipe, device="cpu" if device == "auto" else device, report=report)
    print(f"{arguments.out}: base of {recipe.steps} steps; its log is {arguments.out / 'log.jsonl'}")
    return 0
