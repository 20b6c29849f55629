"""`gve export`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from gve.export.card import CardOptions
from gve.export.export import ExportOptions, ParityError, export
from gve.export.parity import Row, failed

WIDTH = 140  # columns of tables where the output is no terminal


def main(argv: Sequence[str]) -> int:
    """Exports a model.

    Args:
        argv: the words after `gve export`.

    Returns:
        0 done, 1 an exported form gives other vectors than the checkpoint or the disk failed.

    Raises:
        InputError: the checkpoint, its base or an option cannot be used.
    """
    arguments = _parser().parse_args(argv)
    options = ExportOptions(
        adapter_only=arguments.adapter_only,
        dtype=arguments.dtype,
        force=arguments.force,
        check=not arguments.no_check,
        base=arguments.base,
        device=arguments.device,
        card=CardOptions(arguments.name, tuple(arguments.dataset), arguments.licence),
    )
    errors = Console(stderr=True)
    try:
        with errors.status("gve export") as status:
            rows = export(arguments.checkpoint, arguments.out, options, lambda step: status.update(f"{step} ..."))
    except ParityError as error:
        _report(error.rows, arguments)
        print(f"gve export: failed: {error}; {arguments.out} was not written", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"gve export: failed: {error}", file=sys.stderr)
        return 1
    _report(rows, arguments)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gve export",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Merges the adapters of a checkpoint into its base, in float32, and writes a folder that "
        "transformers, sentence-transformers, vLLM and gve load. Ends with a proof: the vectors of every form that can "
        "run here, beside the checkpoint's. Takes the host memory of one float32 copy of the model (7B: 30 GB).",
    )
    parser.add_argument("checkpoint", help="a checkpoint of gve fit, or a folder with an adapter of PEFT")
    parser.add_argument("out", type=Path, help="folder to write; it appears when all is done and proved")
    parser.add_argument("--adapter-only", action="store_true", help="write the adapter alone, in PEFT's format")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the stored weights; auto: that of the base's files",
    )
    parser.add_argument("--force", action="store_true", help="replace an earlier export")
    parser.add_argument("--no-check", action="store_true", help="write without the proof")
    parser.add_argument("--base", default="", help="where the base lies; where it was trained from when empty")
    parser.add_argument("--device", default="cpu", help="torch device of the check")
    parser.add_argument("--name", default="", help="title of the model card; the folder's name when empty")
    parser.add_argument(
        "--dataset", action="append", default=[], metavar="HUB/NAME", help="training data for the card, repeatable"
    )
    parser.add_argument("--licence", default="", help="hub identifier for the card; the base's when empty")
    parser.add_argument("--json", action="store_true", help="print the proof as JSON")
    return parser


def _report(rows: Sequence[Row], arguments: argparse.Namespace) -> None:
    if arguments.json:
        print(json.dumps({"out": str(arguments.out), "rows": [row.to_dict() for row in rows]}))
        return
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    if rows:
        table = Table("form", "content", "1 - cosine", "verdict", "note", title="beside the checkpoint")
        for row in rows:
            value = "-" if row.difference is None else f"{row.difference:.1e}"
            table.add_row(row.form, row.content, value, row.verdict, row.note)
        console.print(table)
    if not failed(rows):
        console.print(f"wrote {arguments.out}", markup=False)
