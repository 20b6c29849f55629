"""The record of one check, and the guard around a part of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from gve.items import one_line

State = Literal["ok", "weak", "absent", "broken"]
WIDTH = 160
"""Most characters of what a check tells of a failure."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Args:
        part: heading it stands under.
        name: what was looked at.
        state: "ok"; "weak": it works with a limit or not as pinned; "absent": optional, and not there; "broken":
            needed, and it does not work.
        detail: what was found, on one line.
        hint: what mends it; empty where nothing needs to be.
    """

    part: str
    name: str
    state: State
    detail: str
    hint: str = ""


def attempt(part: str, look: Callable[[], Iterable[Check]]) -> list[Check]:
    """The checks of one part; what it dies of is its finding."""
    try:
        return list(look())
    except Exception as error:  # whatever a broken installation raises: a doctor that dies of it tells nothing
        return [Check(part, part, "broken", one_line(f"{type(error).__name__}: {error}", WIDTH))]


def size(count: float) -> str:
    """Bytes in words."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
