"""Questions to an index: a text, an image, a clip, or a mix of them that is embedded as one item."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from gve.encode.encoder import Encoder
from gve.eval.uvrb import find_record
from gve.items import Image, InputError, Item, Part, Text, Video
from gve.search.files import printable
from gve.search.index import Hit, Index

# Modalities of a query -> the set of UVRB that asks alike: its instruction is the one that the model was tuned to.
_ASKS_LIKE = {"T": "DREAM-E", "I": "MSRVTT-I2V", "V": "LoVR-C2V", "TI": "MS-TI", "TV": "MS-TV"}


def make_query(
    text: str = "", image: str | Path | None = None, clip: str | Path | None = None, *, instruction: str | None = None
) -> Item:
    """The item of a question.

    Args:
        text: words.
        image: path of a picture.
        clip: path of a video, or a span of one as `path@start-end`.
        instruction: what is asked for; None takes that of the benchmark's set which asks alike, empty is none.

    Raises:
        InputError: nothing is asked, or a span cannot be read.
    """
    parts: list[Part] = []
    if image is not None:
        parts.append(Image(image, name=_name(image)))
    if clip is not None:
        parts.append(parse_clip(str(clip)))
    if text.strip():
        parts.append(Text(text))
    if not parts:
        raise InputError("nothing is asked: give a text, --image or --clip")
    item = Item(tuple(parts))
    if instruction is None:
        instruction = usual_instruction(item)
    return Item(item.parts, instruction, "query")


def usual_instruction(item: Item) -> str:
    """The instruction of the benchmark's set whose queries hold what this one holds."""
    return find_record(_ASKS_LIKE.get(item.modality, "MS-TV")).instruction


def parse_clip(text: str) -> Video:
    """`path`, or `path@start-end` in seconds or as [HH:]MM:SS; a file whose own name reads so is that file.

    Raises:
        InputError: the span is empty.
    """
    path, _, span = text.rpartition("@")
    match = re.fullmatch(r"([\d:.]+)-([\d:.]+)", span)
    if match is None or not path or Path(text).exists():
        return Video(text, name=_name(text))
    return Video(path, name=_name(path), span_s=(_seconds(match[1]), _seconds(match[2])))


def _seconds(text: str) -> float:
    try:
        parts = [float(part) for part in text.split(":")]
    except ValueError:
        parts = []
    if not 1 <= len(parts) <= 3:
        raise InputError(f"{text!r} is no time: write seconds, MM:SS or HH:MM:SS")
    return sum(part * 60**place for place, part in enumerate(reversed(parts)))


def _name(path: str | Path) -> str:
    return printable(str(path).encode("utf-8", "surrogateescape"))


def embed_query(encoder: Encoder, item: Item) -> np.ndarray:
    """[D] float32.

    Raises:
        InputError: a picture or a clip of the query cannot be read.
    """
    encoded = encoder.encode([item])
    if 0 in encoded.failures:
        raise InputError(f"the query cannot be read: {encoded.failures[0]}")
    return encoded.vectors[0]


def ask(index: Index, encoder: Encoder, item: Item, k: int = 10, *, where: str = "") -> list[Hit]:
    """The k moments nearest to a question, exactly.

    Raises:
        InputError: the query or the filter cannot be used, or the index is of another model.
    """
    if encoder.fingerprint != index.record.fingerprint:
        raise InputError(f"index {index.uri} was made by another model or other settings: {index.record.model}")
    return index.search(embed_query(encoder, item), k, where=where)
