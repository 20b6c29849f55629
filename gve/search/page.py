"""Hits as one HTML page: players that stand at the moment that was found."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote_from_bytes

import jinja2

from gve.items import Image, Item, Text, Video
from gve.search.files import printable
from gve.search.index import Hit


def clock(seconds: float) -> str:
    """Seconds as M:SS.s or H:MM:SS.s."""
    tenths = round(seconds * 10)
    hours, rest = divmod(tenths, 36000)
    minutes, rest = divmod(rest, 600)
    text = f"{minutes}:{rest / 10:04.1f}"
    return f"{hours}:{text.rjust(7, '0')}" if hours else text


def link(path: bytes, folder: bytes | None) -> str:
    """The address of a file, every byte escaped that is not plain.

    Args:
        path: absolute.
        folder: of the page, for an address relative to it; None for a file URL.
    """
    if folder is None:
        return "file://" + quote_from_bytes(path)
    # "./" keeps a name with a colon from being read as a scheme.
    return "./" + quote_from_bytes(os.path.relpath(path, folder))


def describe(item: Item) -> list[dict[str, str]]:
    """What was asked, in words."""
    kinds = {Text: "text", Image: "image", Video: "clip"}
    told = []
    for part in item.parts:
        if isinstance(part, Text):
            told.append({"kind": "text", "words": part.text})
        else:
            span = part.span_s if isinstance(part, Video) else None
            words = part.name + (f", {clock(span[0])} to {clock(span[1])}" if span else "")
            told.append({"kind": kinds[type(part)], "words": words})
    return told


def write_page(
    path: str | Path, item: Item, hits: Sequence[Hit], *, about: dict[str, Any] | None = None, absolute: bool = False
) -> None:
    """Writes the page; whole or not at all.

    Args:
        item: what was asked.
        hits: best first.
        about: lines for the foot: index, model, filter.
        absolute: link files by file URLs, so that the page may be moved; relative links move with the videos.
    """
    path = Path(os.path.abspath(path))
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gve.search", ""), autoescape=True, undefined=jinja2.StrictUndefined
    )
    folder = None if absolute else os.fsencode(path.parent)
    cards = [
        {
            "position": position,
            "name": hit.file.name,
            "base": printable(os.path.basename(hit.file.path)),
            # The fragment makes the player start at the moment and stop at its end.
            "source": f"{link(hit.file.path, folder)}#t={hit.start_s:.3f},{hit.end_s:.3f}",
            "span": f"{clock(hit.start_s)} to {clock(hit.end_s)}",
            "whole": hit.start_s == 0 and hit.end_s >= hit.file.duration_s,
            "duration": clock(hit.file.duration_s),
            "score": f"{hit.score:.3f}",
        }
        for position, hit in enumerate(hits, 1)
    ]
    text = environment.get_template("page.html.j2").render(
        asked=describe(item), instruction=item.instruction, cards=cards, about=about or {}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)
