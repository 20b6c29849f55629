"""`python -m gve.own_videos prepare | choose | recipe | evaluate | files`: the steps of experiments/own_videos.sh."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from gve.items import InputError
from gve.own_videos.videos import prepare, read_split

EMBEDDED = Path(__file__).resolve().parent.parent / "toy" / "weights"
_NAMED = 5  # rejected files told on the terminal; all of them stand in split.json


def main(argv: Sequence[str]) -> int:
    """Runs one step.

    Returns:
        0 done, 1 the work failed, 2 the input cannot be used.
    """
    parser = argparse.ArgumentParser(prog="python -m gve.own_videos", description=__doc__)
    steps = parser.add_subparsers(dest="step", required=True)
    first = steps.add_parser("prepare", help="check, split, training pairs")
    first.add_argument("source", type=Path, help="folder of videos, or a csv with the columns video and caption")
    first.add_argument("out", type=Path)
    first.add_argument("--test-share", type=float, default=0.2, help="of the videos held out (default 0.2)")
    first.add_argument("--seed", type=int, default=0)
    chosen = steps.add_parser("choose", help="the base for this machine; prints config, model, tokens and device")
    chosen.add_argument("--model", default="auto")
    second = steps.add_parser("recipe", help="the overlay for gve fit")
    second.add_argument("out", type=Path)
    second.add_argument("--shards", type=Path, required=True)
    second.add_argument("--model", default="auto")
    second.add_argument("--passes", type=int, default=10)
    second.add_argument("--seed", type=int, default=0)
    third = steps.add_parser("evaluate", help="a model on the held-out videos")
    third.add_argument("out", type=Path)
    third.add_argument("--model", required=True)
    third.add_argument("--to", type=Path, required=True, help="folder of the run")
    third.add_argument("--tokens", type=int, default=200)
    third.add_argument("--device", default="cpu")
    fourth = steps.add_parser("files", help="usable files, each ended by a zero byte")
    fourth.add_argument("out", type=Path)
    arguments = parser.parse_args(argv)
    step = {"prepare": _prepare, "choose": _choose, "recipe": _recipe, "evaluate": _evaluate, "files": _files}
    return step[arguments.step](arguments)


def _prepare(arguments: argparse.Namespace) -> int:
    logging.getLogger("gve.video").setLevel(logging.ERROR)  # a short clip repeats frames of the 32 one is cut from
    split = prepare(arguments.source, arguments.out, test_share=arguments.test_share, seed=arguments.seed)
    for name, reason in list(split.rejected.items())[:_NAMED]:
        print(f"left out: {name}: {reason}")
    if len(split.rejected) > _NAMED:
        print(f"left out: and {len(split.rejected) - _NAMED} more, see {arguments.out / 'split.json'}")
    for side, videos in (("train", split.of(test=False)), ("held out", split.of(test=True))):
        captions = sum(len(video.captions) for video in videos)
        print(f"{side}: {len(videos)} videos, {captions} captions")
    if split.facts["duplicates"]:
        print(f"{split.facts['duplicates']} files repeat another's bytes and count as one video")
    if not any(video.captions for video in split.videos):
        print("no captions: training and test ask by a frame of each video; a csv or --captioner gives texts")
    return 0


def _choose(arguments: argparse.Namespace) -> int:
    from gve.own_videos.recipe import choose

    recipe = choose(arguments.model, EMBEDDED)
    print(f"{recipe.config}\t{recipe.model}\t{recipe.tokens}\t{recipe.device}")
    return 0


def _recipe(arguments: argparse.Namespace) -> int:
    from gve.own_videos.recipe import choose, write_recipe

    recipe = choose(arguments.model, EMBEDDED)
    told = write_recipe(arguments.out, arguments.shards, recipe, passes=arguments.passes, seed=arguments.seed)
    print(f"{told['pairs']} pairs, {told['batch']} a step, 3 x {told['steps_per_epoch']} steps")
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from gve.encode.encoder import Execution
    from gve.eval.run import Setting
    from gve.own_videos.evaluation import evaluate_own

    gpu = arguments.device.startswith("cuda")
    execution = Execution(device=arguments.device, dtype="bfloat16" if gpu else "float32", num_workers=4 if gpu else 0)
    videos = read_split(arguments.out).of(test=True)
    run = evaluate_own(videos, arguments.model, arguments.to, Setting(8, arguments.tokens), execution)
    for name, row in run.results.data["sets"].items():
        low, high = row["interval"]
        print(
            f"{name}: R@1 {row['value']:.3f} [{low:.3f}, {high:.3f}], chance {row['chance']:.3f}, "
            f"{row['n_query']} queries, {row['n_corpus']} videos"
        )
        for line in row["missing"]:
            print(f"own_videos: {name}: unread {line}; the same command tries it again", file=sys.stderr)
    return 1 if run.incomplete else 0


def _files(arguments: argparse.Namespace) -> int:
    for video in read_split(arguments.out).videos:
        sys.stdout.buffer.write(os.fsencode(video.path) + b"\0")
    return 0


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
    except InputError as error:
        print(f"own_videos: error: {' '.join(str(error).split())[:400]}", file=sys.stderr)
        code = 2
    raise SystemExit(code)
