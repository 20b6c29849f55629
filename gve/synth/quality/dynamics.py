"""How a clip moves: measured on small pictures, so that noise and compression count for nothing.

A picture is reduced to a grid of 16 x 16 cells of mean colour. Noise of single pixels averages out in a cell, and a
small thing that moves still changes its cells: the change between two pictures is that of the cell that changes most.

A hold is a stretch of time in which no picture changes by more than a level from the stretch's first one; slow motion
adds up and ends it. Holds tell still pictures, slide shows and frozen ends apart: a slide show holds almost all of the
time, cuts or fades between its holds, and shows another picture after each.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

GRID = 16
"""Cells to a side."""
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
BLACK_LEVEL = 32.0
"""A picture is black when none of its cells is brighter, of 255."""
HOLD_S = 0.5
"""Shorter stretches are no holds, nor is a single picture, however long it is shown."""
FADE_S = 1.0
"""The longest way from one slide to the next."""


@dataclass(frozen=True)
class Hold:
    """A stretch of time that stands still: from its first picture to the next change, with that picture's place."""

    start_s: float
    end_s: float
    picture: int

    @property
    def length_s(self) -> float:
        return self.end_s - self.start_s


def cells(pixels: np.ndarray) -> np.ndarray:
    """[T, 16, 16, 3] float32 mean colours of [T, H, W, 3] uint8 pictures, 0 to 255."""
    rows = np.linspace(0, pixels.shape[1], GRID + 1).round().astype(int)
    columns = np.linspace(0, pixels.shape[2], GRID + 1).round().astype(int)
    # A side under 16 px has empty cells, which reduceat fills with the next pixel.
    sums = np.add.reduceat(pixels.astype(np.float32), rows[:-1].clip(max=pixels.shape[1] - 1), axis=1)
    sums = np.add.reduceat(sums, columns[:-1].clip(max=pixels.shape[2] - 1), axis=2)
    area = np.diff(rows).clip(1)[:, None] * np.diff(columns).clip(1)[None, :]
    return sums / area[..., None].astype(np.float32)


def change(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """[...] largest change of a cell between pictures [..., 16, 16, 3], in levels of 255."""
    return np.abs(one - other).max((-3, -2, -1))


def holds(pictures: np.ndarray, times_s: np.ndarray, end_s: float, level: float) -> list[Hold]:
    """The holds of a clip, in order.

    Args:
        pictures: [N, 16, 16, 3], in order of time.
        times_s: [N] when each begins.
        end_s: when the last one ends.
        level: a change under it is none.
    """
    found = []
    first = 0
    for place in range(1, len(pictures) + 1):
        if place < len(pictures) and change(pictures[first], pictures[place]) < level:
            continue
        stop_s = float(times_s[place]) if place < len(pictures) else end_s
        if place - first > 1 and stop_s - times_s[first] >= HOLD_S:
            found.append(Hold(float(times_s[first]), stop_s, first))
        first = place
    return found


def measure(
    sparse: np.ndarray, pictures: np.ndarray, times_s: np.ndarray, end_s: float, level: float
) -> dict[str, float]:
    """What the rules of temporal dynamics judge by.

    Args:
        sparse: [T, 16, 16, 3] cells of the sampled frames.
        pictures, times_s: [N, 16, 16, 3] and [N] of all frames, or again of the sampled ones.
        end_s: length of the clip.
        level: a change under it is none.

    Returns:
        Rounded to 4 digits:

        - motion_mean, motion_max: mean change of all cells between neighbouring sampled frames, in levels of 255: its
          mean and maximum over the neighbours;
        - still_share: of neighbouring sampled frames, the share that look alike;
        - luminance: mean, 0 to 255; black_share: of the sampled frames;
        - held_longest, held_end: share of the time of the longest hold, and of the one that lasts to the end;
        - slides, slide_change: how many different still pictures follow each other by cuts or short fades, and the
          share of the cells that change between them (the median); slide_share: their share of the time.
    """
    steps = np.abs(np.diff(sparse, axis=0)).mean((1, 2, 3)) if len(sparse) > 1 else np.zeros(1)
    still = change(sparse[1:], sparse[:-1]) < level if len(sparse) > 1 else np.ones(1)
    luma = sparse @ LUMA
    found = holds(pictures, times_s, end_s, level)
    length_s = max(end_s - float(times_s[0]), 1e-9)
    last = found[-1] if found and found[-1].end_s >= end_s else None
    slides, slide_change, slide_share = _slides(found, pictures, level)
    values = {
        "motion_mean": steps.mean(),
        "motion_max": steps.max(),
        "still_share": still.mean(),
        "luminance": luma.mean(),
        "black_share": (luma.max((1, 2)) < BLACK_LEVEL).mean(),
        "held_longest": max((hold.length_s for hold in found), default=0.0) / length_s,
        "held_end": last.length_s / length_s if last else 0.0,
        "slides": slides,
        "slide_change": slide_change,
        "slide_share": slide_share / length_s,
    }
    return {name: round(float(value), 4) for name, value in values.items()}


def _slides(found: list[Hold], pictures: np.ndarray, level: float) -> tuple[int, float, float]:
    """Slides, how much of the picture changes between them, and their time in seconds; zeros where it is no show.

    A thing that moves for longer than a fade between two holds makes the clip no slide show; one that blinks leaves
    the picture before and after it alike.
    """
    if len(found) < 2 or any(after.start_s - before.end_s > FADE_S for before, after in pairwise(found)):
        return 0, 0.0, 0.0
    shown = pictures[[hold.picture for hold in found]]
    changed = (np.abs(np.diff(shown, axis=0)).max(-1) >= level).mean((1, 2))
    count = 1 + int((changed > 0).sum())
    if count < 2:
        return 0, 0.0, 0.0
    return count, float(np.median(changed)), sum(hold.length_s for hold in found)
