"""`gve mine`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Column, Table

from gve.data.mixture import mixture
from gve.data.plan import hold_out
from gve.data.shards import QUERY
from gve.data.sources import Source, open_sources
from gve.encode.encoder import Execution
from gve.encode.pretrained import load_encoder, read_checkpoint
from gve.encode.store import EmbeddingStore
from gve.inputs import InputPolicy
from gve.items import InputError
from gve.mining import Mined, MiningOptions, mine
from gve.video import Sampling


def main(argv: Sequence[str]) -> int:
    """Mines hard negatives into one file.

    Args:
        argv: the words after `gve mine`.

    Returns:
        0 done, 1 the work failed.

    Raises:
        InputError: the shards, the prober or an option cannot be used.
    """
    arguments = _parser().parse_args(argv)
    ranks = int(os.environ.get("WORLD_SIZE", "1")) > 1
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if ranks:  # started by torchrun
        device = f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" else device
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        mined = _mine(arguments, device)
        if not ranks or dist.get_rank() == 0:
            _report(mined, arguments.json)
        return 0
    except OSError as error:
        print(f"gve mine: failed: {error}", file=sys.stderr)
        return 1
    finally:
        if ranks:
            dist.destroy_process_group()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gve mine",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Mines hard negatives for the pairs of a shard folder; train with them by data.negatives_file. "
        "Interrupted work goes on from --store. On several GPUs: torchrun --nproc-per-node N -m gve mine ...",
    )
    parser.add_argument("--shards", required=True, help="shard folder")
    parser.add_argument("--out", required=True, type=Path, help="file to write; OUT.json beside it says what is in it")
    parser.add_argument("--checkpoint", default="", help="prober: a checkpoint of gve fit")
    parser.add_argument(
        "--base", default="", help="prober: a base model as it is; with --checkpoint, where its base is"
    )
    parser.add_argument("--source", nargs="+", default=[], help="only these sources")
    parser.add_argument(
        "--per-pair",
        nargs="+",
        default=["published"],
        metavar="N",
        help="hard negatives per pair: a number, NAME=NUMBER by source or task, or `published` (gve shards mixture)",
    )
    choice = parser.add_argument_group("choice")
    defaults = MiningOptions()
    choice.add_argument("--top-k", type=int, default=defaults.top_k, help="nearest candidates that are looked at")
    choice.add_argument("--skip-first", type=int, default=0, help="nearest candidates that are passed over before them")
    choice.add_argument(
        "--max-share",
        type=float,
        default=defaults.max_share,
        help="a negative's cosine is at most this share of the positive's; 0: no such limit",
    )
    choice.add_argument("--margin", type=float, help="a negative's cosine is at most the positive's minus this")
    choice.add_argument(
        "--corpus",
        default="own",
        help="own: targets of the same source; task: of all sources of its task; else a shard folder to search instead",
    )
    choice.add_argument(
        "--dev-pairs", type=int, default=64, help="data.dev_pairs of the training; 0: no row is held out"
    )
    choice.add_argument("--seed", type=int, default=42, help="seed_everything of the training")
    work = parser.add_argument_group("work")
    work.add_argument("--frames", help="frames of a clip: uniform(8), fps(1,8), ...; the checkpoint's when not given")
    work.add_argument("--max-frame-tokens", type=int, help="the checkpoint's when not given")
    work.add_argument("--max-image-tokens", type=int, help="the checkpoint's when not given")
    work.add_argument("--max-length", type=int, help="tokens of one input; the checkpoint's when not given")
    work.add_argument("--store", help="folder that keeps the embeddings; OUT.embeddings when not given")
    work.add_argument("--device", help="torch device; cuda where there is one")
    work.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the base")
    work.add_argument("--attention", default="sdpa", help="kernel: sdpa, eager or flash_attention_2")
    work.add_argument("--batch-tokens", type=int, default=16384, help="most tokens of one forward pass")
    work.add_argument("--num-workers", type=int, default=0, help="processes that decode")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _mine(arguments: argparse.Namespace, device: str) -> Mined:
    options = MiningOptions(
        arguments.top_k, arguments.skip_first, arguments.max_share, arguments.margin, arguments.corpus
    )
    sources = open_sources(arguments.shards)
    if unknown := sorted(set(arguments.source) - set(sources)):
        raise InputError(f"--source {', '.join(unknown)}: {arguments.shards} holds {', '.join(sorted(sources))}")
    counts = parse_counts(arguments.per_pair, {name: sources[name] for name in arguments.source or sources})
    inputs = _inputs(arguments)
    encoder = load_encoder(
        arguments.checkpoint or arguments.base,
        base=arguments.base,
        inputs=inputs,
        execution=Execution(
            device, arguments.dtype, arguments.attention, arguments.batch_tokens, arguments.num_workers
        ),
    )
    held_out = {
        name: hold_out(np.asarray(source.index[:, QUERY:]), arguments.dev_pairs, arguments.seed, name)[1]
        for name, source in sources.items()
    }
    folder = arguments.store or arguments.out.with_name(f"{arguments.out.name}.embeddings")
    store = EmbeddingStore(folder, encoder.fingerprint)
    return mine(sources, encoder, arguments.out, counts, options, store=store, held_out=held_out, inputs=inputs)


def _inputs(arguments: argparse.Namespace) -> InputPolicy:
    if not (arguments.checkpoint or arguments.base):
        raise InputError("the prober is missing: give --checkpoint or --base")
    changes: dict[str, Any] = {
        name: value
        for name in ("max_frame_tokens", "max_image_tokens", "max_length")
        if (value := getattr(arguments, name)) is not None
    }
    if arguments.frames:
        changes["sampling"] = Sampling.parse(arguments.frames)
    policy = InputPolicy()
    if arguments.checkpoint:
        policy = InputPolicy.from_dict(read_checkpoint(arguments.checkpoint)["gve"]["inputs"])
    return policy.replace(**changes)


def parse_counts(words: Sequence[str], sources: Mapping[str, Source]) -> dict[str, int]:
    """Source -> hard negatives per pair, from words like `2`, `web=1`, `T2V=3` and `published`; the closest name wins.

    Raises:
        InputError: a word is none of these, or a source is not in the published mixture.
    """
    given: dict[str, int] = {}
    for word in words:
        name, _, number = word.rpartition("=")
        if word == "published":
            if not set(sources) & set(mixture()):
                raise InputError(
                    "--per-pair published: no source of the shards is in the published mixture; give a number"
                )
            given = {**{row.name: row.negatives for row in mixture().values()}, **given}
        elif number.isdecimal():
            given[name] = int(number)
        else:
            raise InputError(f"--per-pair {word}: give a number, NAME=NUMBER or `published`")
    return {
        name: next((given[key] for key in (name, source.record.task, "") if key in given), 0)
        for name, source in sources.items()
    }


def _report(mined: Mined, as_json: bool) -> None:
    sources = {name: asdict(summary) for name, summary in mined.sources.items()}
    if as_json:
        for values in sources.values():  # NaN is no JSON
            values.update({key: None for key, value in values.items() if value != value})
        print(json.dumps({"file": str(mined.path), "digest": mined.digest, "sources": sources}))
        return
    columns = ("rows", "unreadable", "corpus", "per pair", "with enough", "positive", "negative", "filtered")
    table = Table(Column("source", no_wrap=True), *columns)
    for name, row in mined.sources.items():
        share = row.filtered / row.looked_at if row.looked_at else 0.0
        numbers = (row.rows, row.unreadable, row.corpus, row.per_pair)
        means = (f"{row.enough:.1%}", f"{row.positive:.3f}", f"{row.negative:.3f}", f"{share:.1%}")
        table.add_row(name, *map(str, numbers), *means)
    # Rich takes 80 columns for a pipe or a log file, which would cut the headers off.
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    print(f"{mined.path}: digest {mined.digest}")
