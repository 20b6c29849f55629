"""What the page asks: words, dropped pictures and clips, a moment to find alike, and filters."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import BodyPartReader, web

from gve.items import InputError, Item, Part, Text, Video
from gve.search.files import printable
from gve.search.query import usual_instruction
from gve.serve.openai import checked_text
from gve.serve.uploads import open_medium

MAX_MEDIA = 2
MAX_K = 100
UPLOAD_S = 120.0
"""The longest an upload may take, in seconds."""
_FIELD_BYTES = 1 << 20
_FIELDS = {
    "text", "k", "instruction", "name", "min_duration_s", "max_duration_s", "min_height_px", "like", "like_start_s",
    "like_end_s",
}  # fmt: skip


@dataclass
class Asked:
    """A question as it came.

    Args:
        fields: name -> value, as text or as JSON has it.
        uploads: (file below a folder that the caller deletes, its printable name).
    """

    fields: dict[str, Any] = field(default_factory=dict)
    uploads: list[tuple[Path, str]] = field(default_factory=list)

    def number(self, name: str, least: float, most: float) -> float | None:
        """A number of a range; None where the field is absent or empty.

        Raises:
            InputError: it is none.
        """
        value = self.fields.get(name)
        if value is None or value == "":
            return None
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise InputError(f"{name} {str(value)!r:.60} is no number") from None
        if not (math.isfinite(number) and least <= number <= most):
            raise InputError(f"{name} {number:g} must be from {least:g} to {most:g}")
        return number

    @property
    def k(self) -> int:
        """Moments that are wanted."""
        return int(self.number("k", 1, MAX_K) or 12)

    @property
    def where(self) -> str:
        """The condition of the filters. SQL itself is never taken from a request."""
        parts = []
        if name := checked_text(self.fields.get("name", ""), "name").strip().lower():
            quoted = name.replace("'", "''")
            parts.append(f"contains(lower(file), '{quoted}')")
        for key, column, sign in (
            ("min_duration_s", "duration_s", ">="),
            ("max_duration_s", "duration_s", "<="),
            ("min_height_px", "height", ">="),
        ):
            if (number := self.number(key, 0, 1e9)) is not None:
                # A column of whole numbers is not compared with a fraction.
                value = str(math.ceil(number)) if column == "height" else f"{number:.3f}"
                parts.append(f"{column} {sign} {value}")
        return " AND ".join(parts)


async def read_question(request: web.Request, folder: Path, max_bytes: int) -> Asked:
    """Reads a question in JSON or as a form with files; files are measured while they are stored.

    Args:
        folder: where files go.
        max_bytes: of all files together.

    Raises:
        InputError: it cannot be read.
        web.HTTPException: it is too large or too slow.
    """
    if (request.content_length or 0) > max_bytes + _FIELD_BYTES:
        raise _too_large(max_bytes)
    try:
        async with asyncio.timeout(UPLOAD_S):
            if request.content_type == "multipart/form-data":
                asked = await _form(request, folder, max_bytes)
            else:
                body = await request.json()
                if not isinstance(body, Mapping):
                    raise InputError("the question must be a JSON object")
                asked = Asked(dict(body))
    except TimeoutError:
        raise web.HTTPRequestTimeout(text=f"the question took more than {UPLOAD_S:g} s to arrive") from None
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"the question cannot be read: {error}") from None
    if unknown := sorted(set(asked.fields) - _FIELDS):
        raise InputError(f"field {unknown[0]!r:.60} is unknown; known: media, {', '.join(sorted(_FIELDS))}")
    return asked


async def _form(request: web.Request, folder: Path, max_bytes: int) -> Asked:
    asked = Asked()
    room = max_bytes
    async for part in await request.multipart():
        if not isinstance(part, BodyPartReader) or not part.name:
            raise InputError("the form has a part without a name")
        if part.name != "media":
            value = bytearray()
            while chunk := await part.read_chunk():
                value += chunk
                if len(value) > _FIELD_BYTES:
                    raise _too_large(_FIELD_BYTES)
            asked.fields[part.name] = value.decode("utf-8")
            continue
        if len(asked.uploads) == MAX_MEDIA:
            raise InputError(f"more than {MAX_MEDIA} pictures and clips in one question")
        path = folder / str(len(asked.uploads))  # never the name that was sent
        with open(path, "wb") as file:
            while chunk := await part.read_chunk(1 << 18):
                room -= len(chunk)
                if room < 0:
                    raise _too_large(max_bytes)
                await asyncio.to_thread(file.write, chunk)
        asked.uploads.append((path, printable((part.filename or "upload").encode("utf-8", "replace"))[:200]))
    return asked


def _too_large(limit: int) -> web.HTTPRequestEntityTooLarge:
    return web.HTTPRequestEntityTooLarge(max_size=limit, actual_size=limit, text=f"more than {limit / 2**20:g} MiB")


def item_of(asked: Asked, moment: Video | None) -> Item:
    """The item of a question; uploads are opened in a child process.

    Args:
        moment: the indexed moment that others shall be like.

    Raises:
        InputError: nothing is asked, or an upload is neither a picture nor a video.
    """
    parts: list[Part] = [open_medium(path, name) for path, name in asked.uploads]
    # The order of gve search: pictures, clips, words.
    parts.sort(key=lambda part: isinstance(part, Video))
    if moment is not None:
        parts.append(moment)
    text = checked_text(asked.fields.get("text", ""), "text")
    if text.strip():
        parts.append(Text(text))
    if not parts:
        raise InputError("nothing is asked: give a text, a picture or a clip")
    item = Item(tuple(parts))
    given = asked.fields.get("instruction")
    instruction = usual_instruction(item) if given is None else checked_text(given, "instruction")
    return Item(item.parts, instruction, "query")


def moment_of(asked: Asked, path: bytes, duration_s: float) -> Video:
    """A span of an indexed file; the whole of it when no times are given."""
    start_s = asked.number("like_start_s", 0, duration_s) or 0.0
    end_s = asked.number("like_end_s", 0, 1e9)
    whole = start_s == 0 and (end_s is None or end_s >= duration_s)
    name = printable(os.path.basename(path))
    return Video(os.fsdecode(path), name=name, span_s=None if whole else (start_s, end_s or duration_s))
