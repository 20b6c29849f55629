"""Evaluation-time ablations: the same weights are shown less, and the score says what the rest was worth.

- static: the middle frame of each clip in place of all: what is left needs no motion.
- shuffled, reversed: the frames of each clip in another order: what is left needs no order.
- black: black pixels for clips and images: what is left is a leak; a text set must fall to chance.
- text_only: the text without pictures. A composed query loses its media; where the query is text alone, the corpus
  turns black, and the score must fall to chance.
- media_only: the pictures without text. A composed query keeps its media; where the query is text alone, nothing but
  the instruction is left of it, and the score must fall to chance.

Pictures are changed on decoded items inside the encoder's workers, queries before anything is decoded. The last two say
nothing about sets whose queries are pictures alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gve.eval.uvrb import RetrievalSet
from gve.items import Frames, Image, InputError, Item, Part, Text, Video


def _static(frames: Frames, key: str) -> np.ndarray:
    return np.full(len(frames.pixels), len(frames.pixels) // 2)


def _shuffled(frames: Frames, key: str) -> np.ndarray:
    """A permutation that the clip's content decides; never the identity, which would leave the clip as it is."""
    count = len(frames.pixels)
    words = np.random.Philox(key=int(hashlib.sha256(f"shuffled\0{key}".encode()).hexdigest()[:32], 16)).random_raw(
        count
    )
    order = np.argsort(words, kind="stable")
    return np.roll(order, 1) if np.array_equal(order, np.arange(count)) else order


def _reversed(frames: Frames, key: str) -> np.ndarray:
    return np.arange(len(frames.pixels))[::-1]


_ORDERS: dict[str, Callable[[Frames, str], np.ndarray]] = {
    "static": _static,
    "shuffled": _shuffled,
    "reversed": _reversed,
}
PIXEL_ABLATIONS = (*_ORDERS, "black")
QUERY_ABLATIONS: dict[str, tuple[type[Part], ...]] = {"text_only": (Text,), "media_only": (Image, Video)}
ABLATIONS = (*PIXEL_ABLATIONS, *QUERY_ABLATIONS)


@dataclass(frozen=True)
class PixelAblation:
    """A transform (see gve.encode.encoder) of what decoded clips and images show; times stay as they were.

    Args:
        name: one of PIXEL_ABLATIONS.
    """

    name: str

    def touches(self, item: Item) -> bool:
        return any(isinstance(part, Video) or (self.name == "black" and isinstance(part, Image)) for part in item.parts)

    def __call__(self, item: Item) -> Item:
        return dataclasses.replace(item, parts=tuple(self._part(part) for part in item.parts))

    def _part(self, part: Part) -> Part:
        """The changed part; without the old hash, so that no cache takes it for the original."""
        if isinstance(part, Video) and isinstance(part.source, Frames):
            frames = part.source
            if self.name == "black":
                pixels = np.zeros_like(frames.pixels)
            else:
                pixels = frames.pixels[_ORDERS[self.name](frames, part.content_hash())]
            return Video(dataclasses.replace(frames, pixels=pixels), name=part.name)
        if self.name == "black" and isinstance(part, Image) and isinstance(part.source, np.ndarray):
            return Image(np.zeros_like(part.source), name=part.name)
        if isinstance(part, Text) or (isinstance(part, Image) and self.name != "black"):
            return part
        raise TypeError(f"{self.name} needs a decoded {type(part).__name__}, got {type(part.source).__name__}")


def check_ablations(names: list[str]) -> None:
    """Raises InputError at a name that is no ablation."""
    for name in names:
        if name not in ABLATIONS:
            raise InputError(f"no ablation is called {name!r}; known: {', '.join(ABLATIONS)}")


def concerns(name: str, tested: RetrievalSet) -> bool:
    """Whether the ablation says something about the set."""
    return name in PIXEL_ABLATIONS or "T" in tested.record.query


def pixels_of(name: str, tested: RetrievalSet) -> PixelAblation | None:
    """What the ablation does to the pictures of the set; None where they stay as they are."""
    if name == "text_only" and tested.record.query == "T":
        return PixelAblation("black")
    return PixelAblation(name) if name in PIXEL_ABLATIONS else None


def ablated_queries(name: str, tested: RetrievalSet) -> tuple[Item, ...]:
    """The queries with the kept half, instruction included; as they are under an ablation of pixels."""
    if name not in QUERY_ABLATIONS:
        return tested.queries
    kept = QUERY_ABLATIONS[name]
    return tuple(
        dataclasses.replace(item, parts=tuple(part for part in item.parts if isinstance(part, kept)))
        for item in tested.queries
    )
