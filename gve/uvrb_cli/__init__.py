"""`gve uvrb list | prepare | check | run | compare | report | import-mteb`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

# command -> its module, so that `list` waits for no torch
MODULES = {
    "list": "data",
    "prepare": "data",
    "check": "data",
    "run": "run",
    "compare": "report",
    "report": "report",
    "import-mteb": "neighbours",
}


def main(argv: Sequence[str]) -> int:
    """Runs one of the commands.

    Args:
        argv: the words after `gve uvrb`.

    Returns:
        0 done, 1 the work failed or a set is incomplete, 2 the input cannot be used.
    """
    arguments = parse(argv)
    try:
        return arguments.handler(arguments)
    except OSError as error:
        print(f"gve uvrb {arguments.command}: failed: {error}", file=sys.stderr)
        return 1


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of a command; exits with 2 where they cannot be read."""
    parser = argparse.ArgumentParser(
        prog="gve uvrb", description="UVRB: 16 sets of universal video retrieval, 9 abilities, for any embedder."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    own = MODULES.get(argv[0]) if argv else None
    for module in [own] if own else dict.fromkeys(MODULES.values()):  # the overview needs them all
        importlib.import_module(f"gve.uvrb_cli.{module}").add_parsers(commands)
    return parser.parse_args(argv)
