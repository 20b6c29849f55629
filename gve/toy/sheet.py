"""Contact sheets: what a world's test sets ask, and what answers it, for people to look at."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw

from gve.eval.uvrb import RetrievalSet, UVRBReader
from gve.items import Image, Item
from gve.toy.scenes import SIDE_PX
from gve.video import Sampling, decode, decode_image

LINE_PX = 12
LETTERS = 112  # a line of text, above eight frames


def contact_sheet(world: Path, per_set: int = 2) -> PILImage.Image:
    """A picture with, for each set, some queries (text and media), each above the frames of its first positive."""
    reader = UVRBReader(world / "uvrb")
    rows = [row for name in reader.names() for row in _rows(reader.read(name), per_set)]
    sheet = PILImage.new("RGB", (SIDE_PX * 8, sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet


def _rows(test_set: RetrievalSet, count: int) -> list[PILImage.Image]:
    rows = []
    for number in np.linspace(0, len(test_set.queries) - 1, count).round().astype(int):
        query, positives = test_set.queries[number], test_set.positives[number]
        rows.append(_text(f"{test_set.record.name} {query.id} ({len(positives)} positives): {query.text}"))
        rows += [_strip(query)] if query.media else []
        rows.append(_text("is answered by"))
        rows.append(_strip(test_set.corpus[positives[0]]))
    return rows


def _text(text: str) -> PILImage.Image:
    lines = textwrap.wrap(text, LETTERS)[:4]
    row = PILImage.new("RGB", (SIDE_PX * 8, LINE_PX * len(lines) + 6), "white")
    ImageDraw.Draw(row).multiline_text((2, 2), "\n".join(lines), fill="black", spacing=1)
    return row


def _strip(item: Item) -> PILImage.Image:
    medium = item.media[0]
    path = Path(str(medium.source))
    pictures = [decode_image(path)] if isinstance(medium, Image) else list(decode(path, Sampling.uniform(8)).pixels)
    for picture in pictures:
        picture[:, -1] = 255  # a line between frames
    return PILImage.fromarray(np.concatenate(pictures, axis=1))
