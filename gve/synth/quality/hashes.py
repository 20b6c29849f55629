"""Signatures that tell copies: of texts, and of clips by the perceptual hashes of their frames in order of time.

Two clips are near when their hashes differ in few bits a frame, frame by frame in order, and their mean levels agree
in a coarse grid. The hashes make copies findable among millions; the levels tell copies from clips that only look
alike to a hash, which sees where it gets lighter and not by how much: other colours, or a small thing elsewhere. A copy
that was encoded again or resized stays near; one that was trimmed, mirrored or bordered is not found.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import PIL.Image

from gve.synth.quality.dynamics import LUMA

BITS = 64
COLOUR_GRID = 4
MAX_BUCKET = 256
"""How many rows with the same key a row is compared with, those before it: bounds the work where thousands of clips
share a frame (black, a title card)."""


@dataclass(frozen=True, eq=False)
class ClipHash:
    """The signature of a clip.

    Args:
        frames: [T] uint64, perceptual hash of each sampled frame, in order of time.
        colours: [48 + 16 T] uint8, in a grid of 4 x 4 cells: mean colours over all frames, then the grey of each frame.
    """

    frames: np.ndarray
    colours: np.ndarray

    @classmethod
    def of(cls, pixels: np.ndarray) -> ClipHash:
        """Of sampled frames, [T, H, W, 3] uint8.

        The hash is dHash of ImageHash, 64 bits: on toy clips encoded again at crf 36 it differed in at most 3 bits a
        frame, pHash in up to 14, since most of a flat picture's frequencies are noise.
        """
        import imagehash

        pictures = [PIL.Image.fromarray(frame) for frame in pixels]
        values = [int(str(imagehash.dhash(picture)), 16) for picture in pictures]
        size = (COLOUR_GRID, COLOUR_GRID)
        grids = np.stack([np.asarray(picture.resize(size, PIL.Image.Resampling.BOX)) for picture in pictures])
        levels = [grids.mean(0).ravel(), (grids @ LUMA).ravel()]
        return cls(np.array(values, np.uint64), np.concatenate(levels).round().clip(0, 255).astype(np.uint8))

    @classmethod
    def from_text(cls, text: str) -> ClipHash:
        """The inverse of str()."""
        frames, _, colours = text.partition(":")
        return cls(
            np.array([int(frames[at : at + 16], 16) for at in range(0, len(frames), 16)], np.uint64),
            np.frombuffer(bytes.fromhex(colours), np.uint8),
        )

    def __str__(self) -> str:
        return "".join(f"{int(value):016x}" for value in self.frames) + ":" + self.colours.tobytes().hex()


def text_key(text: str) -> str:
    """16 hex digits that agree where texts differ in case, punctuation and blanks alone; of letters of any script."""
    words = "".join(
        char if unicodedata.category(char)[0] in "LMN" else " " for char in unicodedata.normalize("NFKC", text)
    )
    return hashlib.sha256(" ".join(words.casefold().split()).encode()).hexdigest()[:16]


def bits(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """[...] mean of differing bits a frame between hashes [..., T] uint64."""
    return np.bitwise_count(one ^ other).mean(-1)


def colour_distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """[...] largest difference of a mean level between `ClipHash.colours` [..., 48 + 16 T], in levels of 255."""
    return np.abs(one.astype(np.int16) - other.astype(np.int16)).max(-1)


def near_pairs(frames: np.ndarray, colours: np.ndarray, max_bits: float, max_colour: float) -> np.ndarray:
    """Pairs of clips that look alike.

    Every frame is a place where two clips can be found: where their mean distance is at most d, some frame differs in
    at most floor(d) bits. Its 64 bits are cut into blocks, more than that many, so that some blocks agree in full; each
    choice of that many blocks is a key, and rows of equal keys are compared. Time: (frames x choices) sorts of N keys,
    with a comparison for every two rows of one key; a million clips at 4 bits take 120 sorts. Memory: 300 bytes a clip
    and 32 a pair. Pairs may be missed only where a key has more than MAX_BUCKET rows.

    Args:
        frames: [N, T] uint64, `ClipHash.frames` of each clip.
        colours: [N, L] uint8, `ClipHash.colours`.
        max_bits: differing bits a frame, on average.
        max_colour: the largest difference of a mean level.

    Returns:
        [P, 2] int64 places, the smaller first, sorted, each pair once.
    """
    found = [np.zeros((0, 2), np.int64)]
    for keys in _keys(frames, math.floor(max_bits)):
        order = np.argsort(keys, kind="stable")
        ranked = keys[order]
        left = np.arange(len(order))
        for lag in range(1, MAX_BUCKET + 1):
            left = left[left + lag < len(order)]
            left = left[ranked[left] == ranked[left + lag]]
            if not len(left):
                break
            pairs = np.stack([order[left], order[left + lag]], 1)  # stable, so the smaller place comes first
            pairs = pairs[bits(frames[pairs[:, 0]], frames[pairs[:, 1]]) <= max_bits]
            found.append(pairs[colour_distance(colours[pairs[:, 0]], colours[pairs[:, 1]]) <= max_colour])
        found = [np.unique(np.concatenate(found), axis=0)]  # most pairs are found by many keys
    return np.unique(np.concatenate(found), axis=0)


def _keys(hashes: np.ndarray, radius: int) -> Iterator[np.ndarray]:
    """[N] uint64 keys, table by table: hashes of [N, T] within `radius` bits in some frame share one of them.

    With b blocks of which r are taken, up to b - r differing bits leave some choice untouched. r grows until a key has
    about as many bits as are needed to tell N rows apart.
    """
    wanted = min(math.log2(max(len(hashes), 2)), BITS / 2)
    kept = next(kept for kept in itertools.count(1) if kept * (BITS // (radius + kept)) >= wanted or kept == BITS // 4)
    edges = np.linspace(0, BITS, radius + kept + 1).astype(int)
    blocks = [((1 << int(stop)) - 1) ^ ((1 << int(start)) - 1) for start, stop in itertools.pairwise(edges)]
    for frame in range(hashes.shape[1]):
        for chosen in itertools.combinations(blocks, kept):
            yield hashes[:, frame] & np.uint64(sum(chosen))
