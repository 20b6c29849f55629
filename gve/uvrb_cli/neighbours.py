"""`gve uvrb import-mteb`: results of other benchmarks' runners, beside ours."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import Any


def add_parsers(commands: Any) -> None:
    """Adds `import-mteb`."""
    parser = commands.add_parser(
        "import-mteb",
        help="read results of MTEB",
        description="Reads result files of MTEB (<model>/<revision>/<task>.json) as rows: main score, nDCG@10, R@1, "
        "queries. Its sets are not UVRB's, so the rows never enter UVRB averages.",
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="FILE", help="result files, or folders of them")
    parser.add_argument("--out", type=Path, metavar="JSON", help="also write the rows to this file")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON instead of a table")
    parser.set_defaults(handler=import_mteb)


def import_mteb(arguments: argparse.Namespace) -> int:
    """Prints the rows, and writes them if asked."""
    from gve.eval.mteb_results import read_mteb_results

    rows = [dataclasses.asdict(score) for score in read_mteb_results(arguments.paths)]
    text = json.dumps(rows, indent=1)
    if arguments.out:
        draft = arguments.out.with_name(arguments.out.name + ".tmp")
        draft.write_text(text + "\n")
        os.replace(draft, arguments.out)
    print(text if arguments.json else _table(rows))
    return 0


def _table(rows: list[dict[str, Any]]) -> str:
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "task", "split", "subset", "main score", "nDCG@10", "R@1", "queries")
    for row in rows:
        scores = [row[name] for name in ("main_score", "ndcg_at_10", "recall_at_1")]
        cells = [row[name] for name in ("model", "task", "split", "subset")]
        cells += ["-" if score is None else f"{score:.4f}" for score in scores]
        table.add_row(*cells, "-" if row["num_queries"] is None else str(row["num_queries"]))
    console = Console(width=160)
    with console.capture() as captured:
        console.print(table)
    return captured.get().rstrip()
