"""Part of `gve uvrb`."""

from __future__ import annotations

from typing import Any


def add_parsers(commands: Any) -> None:
    """Adds this module's commands."""
