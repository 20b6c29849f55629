"""Signatures that tell copies: of texts, and of clips by the perceptual hashes of their frames in order of time.

Two clips are near when their hashes differ in few bits a frame, frame by frame in order, and their mean colours agree:
a perceptual hash sees light and dark alone, and the same course run backwards has the same frames in another order. A
copy that was encoded again or resized stays within a few bits; one that was trimmed, mirrored or bordered is not found.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image

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
        colours: [48] uint8, mean colour over the frames of a grid of 4 x 4 cells.
    """

    frames: np.ndarray
    colours: np.ndarray

    @classmethod
    def of(cls, pixels: np.ndarray) -> ClipHash:
        """Of sampled frames, [T, H, W, 3] uint8 (pHash of ImageHash, 64 bits)."""
        import imagehash

        values = []
        mean = np.zeros((COLOUR_GRID, COLOUR_GRID, 3), np.float64)
        for frame in pixels:
            picture = PIL.Image.fromarray(frame)
            values.append(int(str(imagehash.phash(picture)), 16))
            mean += np.asarray(picture.resize((COLOUR_GRID, COLOUR_GRID), PIL.Image.Resampling.BOX))
        return cls(np.array(values, np.uint64), (mean / len(pixels)).round().astype(np.uint8).reshape(-1))

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
    """[...] largest difference of a mean colour between [..., 48] uint8, in levels of 255."""
    return np.abs(one.astype(np.int16) - other.astype(np.int16)).max(-1)


def near_pairs(clips: Sequence[ClipHash], max_bits: float, max_colour: float) -> np.ndarray:
    """Pairs of clips that look alike.

    Every frame is a place where two clips can be found: where their mean distance is at most d, some frame differs in
    at most floor(d) bits. Its 64 bits are cut into blocks, more than that many, so that some blocks agree in full; each
    choice of that many blocks is a key, and rows of equal keys are compared. Time: (frames x choices) sorts of N keys,
    and N comparisons for each; a million clips at 4 bits take 120 sorts. Memory: 130 bytes a clip and 24 bytes a pair
    found. Pairs may be missed only where a key has more than MAX_BUCKET rows.

    Args:
        clips: N signatures of equally many frames.
        max_bits: differing bits a frame, on average.
        max_colour: the largest difference of a mean colour, in levels.

    Returns:
        [P, 2] int64 places, the smaller first, sorted, each pair once.
    """
    if len(clips) < 2:
        return np.zeros((0, 2), np.int64)
    hashes = np.stack([clip.frames for clip in clips])
    colours = np.stack([clip.colours for clip in clips])
    found = [np.zeros((0, 2), np.int64)]
    for keys in _keys(hashes, math.floor(max_bits)):
        order = np.argsort(keys, kind="stable")
        ranked = keys[order]
        left = np.arange(len(order))
        for lag in range(1, MAX_BUCKET + 1):
            left = left[left + lag < len(order)]
            left = left[ranked[left] == ranked[left + lag]]
            if not len(left):
                break
            pairs = np.stack([order[left], order[left + lag]], 1)  # stable, so the smaller place comes first
            pairs = pairs[bits(hashes[pairs[:, 0]], hashes[pairs[:, 1]]) <= max_bits]
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
