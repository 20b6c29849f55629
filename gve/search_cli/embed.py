"""`gve embed`."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gve.items import InputError
from gve.search_cli.model import add_model_options, model_name, open_model, setting_of

_NAMED = 5  # failures told on the terminal; all of them stand in the JSON file


def main(argv: Sequence[str]) -> int:
    """Embeds items into one file.

    Args:
        argv: the words after `gve embed`.

    Returns:
        0 done, 1 an item could not be read or the work failed.

    Raises:
        InputError: an input, an option or the model cannot be used.
    """
    try:
        return _embed(_parser().parse_args(argv))
    except OSError as error:
        print(f"gve embed: failed: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gve embed",
        description="Embeds texts, pictures, videos and mixes of them into one file of unit vectors. Interrupted work "
        "goes on from --store; each distinct content is encoded once. Under torchrun or srun the ranks share the work. "
        "Exit 1 when an item could not be read: it is named, and has no row in the file.",
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="a picture, a video, a folder of them, a .txt with a text a line, or a .jsonl or .parquet with an item a "
        "row: text, image, video, id, instruction, start_s, end_s (seconds of the video)",
    )
    parser.add_argument("--out", required=True, type=Path, help="file to write: F.npy, F.parquet or F.safetensors")
    parser.add_argument("--instruction", default="", help="precedes the text of items that name none; for queries")
    parser.add_argument("--store", type=Path, help="folder that keeps the vectors; OUT.embeddings when not given")
    parser.add_argument("--allow-incomplete", action="store_true", help="exit 0 where items could not be read")
    parser.add_argument("--json", action="store_true", help="print what was done as JSON")
    add_model_options(parser, stored=False)
    return parser


def _embed(arguments: argparse.Namespace) -> int:
    from gve.search.vectors import check_format

    check_format(arguments.out)
    from gve.encode.ranks import broadcast, joined
    from gve.encode.store import EmbeddingStore, encode_items
    from gve.search.listing import list_items
    from gve.search.vectors import write_vectors

    start = time.monotonic()
    setting = setting_of(arguments)
    with joined() as place:
        listed = broadcast(list_items(arguments.inputs, arguments.instruction) if place.rank == 0 else None)
        assert listed is not None
        if not listed.items and not listed.failures:
            raise InputError(f"{', '.join(arguments.inputs)}: no pictures, no videos and no rows in it")
        encoder = open_model(
            arguments,
            place,
            setting,
            model=arguments.model,
            adapter=arguments.adapter or "auto",
            base=arguments.base or "",
        )
        # Vectors of another dtype differ in their last bits, and are not taken for these.
        key = hashlib.sha256(f"{encoder.fingerprint}\0{arguments.dtype}".encode()).hexdigest()
        folder = arguments.store or arguments.out.with_name(f"{arguments.out.name}.embeddings")
        store = EmbeddingStore(folder, key)
        encoded = encode_items(encoder, listed.items, store, progress="embedding" if not arguments.json else "")
        failures = listed.failures | {listed.items[row].id: reason for row, reason in encoded.failures.items()}
        good = [row for row in range(len(listed.items)) if row not in encoded.failures]
        if place.rank == 0:
            facts = {
                "model": model_name(arguments.model),
                "fingerprint": encoder.fingerprint,
                "weights": encoder.weights_hash,
                "inputs": encoder.inputs,
                "failures": failures,
            }
            ids = [listed.items[row].id for row in good]
            write_vectors(arguments.out, ids, encoded.vectors[good], facts)
            told = {
                "file": str(arguments.out),
                "items": len(ids),
                "dim": encoder.dim,
                "encoded": store.added,
                "skipped": len(listed.skipped),
                "failures": failures,
                "fingerprint": encoder.fingerprint,
                "seconds": round(time.monotonic() - start, 1),
            }
            _tell(told, listed.skipped, arguments.json)
    return 1 if failures and not arguments.allow_incomplete else 0


def _tell(told: dict, skipped: Sequence[str], as_json: bool) -> None:
    failures = told["failures"]
    for name, reason in list(failures.items())[:_NAMED]:
        print(f"gve embed: {name}: {reason}", file=sys.stderr)
    if len(failures) > _NAMED:
        print(f"gve embed: and {len(failures) - _NAMED} more, see {told['file']}.json", file=sys.stderr)
    if as_json:
        print(json.dumps(told))
        return
    print(
        f"{told['file']}: {told['items']} vectors of {told['dim']}, {told['encoded']} encoded now, "
        f"{len(failures)} unreadable, {told['seconds']:.0f} s"
    )
    if skipped:
        print(f"skipped {len(skipped)} files that are neither pictures nor videos, {skipped[0]} among them")
