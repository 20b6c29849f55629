"""`gve search`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gve.items import InputError
from gve.search_cli.model import add_model_options, address_of, open_asker


def main(argv: Sequence[str]) -> int:
    """Asks an index.

    Args:
        argv: the words after `gve search`.

    Returns:
        0, also where nothing was found.

    Raises:
        InputError: the index, the query or an option cannot be used.
    """
    arguments = _parser().parse_args(argv)
    try:
        return _search(arguments)
    except OSError as error:
        print(f"gve search: failed: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    from gve.search.index import FILTERS

    parser = argparse.ArgumentParser(
        prog="gve search",
        description="Finds moments of indexed videos by a text, a picture, a clip, or a mix of them, which the model "
        "reads as one question. Every window is compared, nothing is missed, unless --nprobes asks for less.",
    )
    parser.add_argument("index", metavar="INDEX", help="folder or address made by gve index")
    parser.add_argument("text", nargs="?", default="", help="what is looked for, in words")
    parser.add_argument("--image", help="a picture that is part of the question")
    parser.add_argument("--clip", metavar="FILE[@START-END]", help="a video, or a span of it in seconds or MM:SS")
    parser.add_argument(
        "--instruction", help="precedes the text; the benchmark's for such a question when not given, '' for none"
    )
    parser.add_argument("-k", "--k", type=int, default=10, help="moments to show (default 10)")
    parser.add_argument(
        "--filter",
        default="",
        metavar="SQL",
        help=f"condition, for example \"duration_s > 60 AND file LIKE '%%/holiday/%%'\"; columns: {', '.join(FILTERS)}",
    )
    parser.add_argument("--all-windows", action="store_true", help="show overlapping windows of a file one by one")
    parser.add_argument("--nprobes", type=int, metavar="N", help="look into N cells of the inverted file alone")
    parser.add_argument("--html", type=Path, metavar="PAGE", help="write a page with players at the moments")
    parser.add_argument(
        "--file-urls", action="store_true", help="the page links files by file URLs, not relative to it"
    )
    parser.add_argument("--json", action="store_true", help="print the hits as JSON")
    add_model_options(parser, stored=True)
    return parser


def _search(arguments: argparse.Namespace) -> int:
    from gve.search.index import Index
    from gve.search.query import make_query

    if arguments.k < 1 or (arguments.nprobes is not None and arguments.nprobes < 1):
        raise InputError("-k and --nprobes must be at least 1")
    index = Index.open(address_of(arguments.index))
    item = make_query(arguments.text, arguments.image, arguments.clip, instruction=arguments.instruction)
    from gve.search.query import embed_query

    encoder, _ = open_asker(arguments, index)
    start = time.monotonic()
    vector = embed_query(encoder, item)
    embedded = time.monotonic()
    hits = index.search(
        vector, arguments.k, where=arguments.filter, nprobes=arguments.nprobes, merge=not arguments.all_windows
    )
    seconds = {"embed_s": round(embedded - start, 4), "search_s": round(time.monotonic() - embedded, 4)}
    if arguments.html:
        from gve.search.page import write_page

        about = {"index": index.uri, "model": index.record.model}
        if arguments.filter:
            about["filter"] = arguments.filter
        write_page(arguments.html, item, hits, about=about, absolute=arguments.file_urls)
    if arguments.json:
        listed = [{"position": position, **hit.to_dict()} for position, hit in enumerate(hits, 1)]
        print(json.dumps({"index": index.uri, "hits": listed, "exact": arguments.nprobes is None, **seconds}))
        return 0
    from gve.search.page import clock

    table = Table()
    for head in ("", "score", "from", "to"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("file", overflow="fold")
    for position, hit in enumerate(hits, 1):
        # Text and not a string: brackets in a name are no markup.
        table.add_row(str(position), f"{hit.score:.3f}", clock(hit.start_s), clock(hit.end_s), Text(hit.file.name))
    Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(table)
    if arguments.html:
        print(f"page: {arguments.html}")
    return 0
