"""What may be read, and how a file is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

from gve.items import InputError

Source = str | Path | bytes

MAX_PIXELS = 89_478_485
"""The most pixels of one picture or frame: Pillow's own bomb limit. A GIF of 44 bytes can claim 4 gigapixels."""


class MediaError(InputError):
    """A picture or a video that cannot be used.

    Args:
        message: one line that names the file and what is wrong with it.
        reason: a slug: missing, unreadable, empty, not-a-video, no-video-stream, undecodable, truncated, garbled,
            too-large, timeout, crashed, out-of-memory, no-decoder, no-such-span, not-an-image.
        name: the file, as the caller calls it.
    """

    def __init__(self, message: str, *, reason: str = "undecodable", name: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.name = name


def reject(name: str, reason: str, detail: str) -> NoReturn:
    """Raises the MediaError of one line."""
    raise MediaError(f"{name}: {detail} ({reason})", reason=reason, name=name)


def called(source: Source, name: str) -> str:
    """What messages call it: the name the caller gave, else the path, else its size."""
    return name or (f"<{len(source)} bytes>" if isinstance(source, bytes) else str(source))


def check_exists(source: Source, name: str) -> None:
    """Refuses what is no file and what has no bytes, before any decoder sees it."""
    if isinstance(source, bytes):
        size = len(source)
    elif not os.path.isfile(source):
        reject(name, "missing", "no such file")
    elif not os.access(source, os.R_OK):
        reject(name, "unreadable", "no permission to read it")
    else:
        size = os.path.getsize(source)
    if size == 0:
        reject(name, "empty", "the file has no bytes")


def reason_of(error: BaseException) -> str:
    """A library's own words, without its address of the file."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
