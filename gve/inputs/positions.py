"""M-RoPE positions (time, height, width) by a named rule, computed outside the model and always passed to it.

transformers changed both halves of the rule between versions, with no error and other vectors: where text continues
after a clip (5.x), and whether seconds between grid steps keep their fraction (4.52 to 4.57 cut them). So the rule is
part of the input policy; goldens recorded from transformers 4.51 and 4.52 hold it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gve.inputs.policy import PositionsRule, TimesRule, VisionGeometry
from gve.items import Frames, InputError


@dataclass(frozen=True, eq=False)
class VisionSpan:
    """The placeholders of one image or clip in a sequence.

    Args:
        grid: (t, h, w) in patches.
        times_s: [t] float32, seconds of each grid step after the first; None for an image, whose steps are at 0.
    """

    grid: tuple[int, int, int]
    times_s: np.ndarray | None = None


def grid_times(frames: Frames, temporal_patch: int, rule: TimesRule) -> np.ndarray:
    """Seconds of each grid step of a clip after its first step.

    Args:
        frames: T frames; T is a multiple of `temporal_patch`.
        temporal_patch: frames in one grid step.
        rule: see `InputPolicy.times`.

    Returns:
        [T / temporal_patch] float32.

    Raises:
        InputError: by the rule "timestamps", times that fall.
    """
    steps = len(frames.indices) // temporal_patch
    if rule == "timestamps":
        times = np.asarray(frames.times_s, np.float64).reshape(steps, temporal_patch).mean(axis=1)
        if np.any(np.diff(times) < 0):
            raise InputError(
                "frame times fall, so they cannot be positions; keep frames in order or use released times"
            )
        return (times - times[0]).astype(np.float32)
    second_per_grid = temporal_patch / frames.sampled_fps
    if rule == "whole_seconds":
        second_per_grid = int(second_per_grid)
    # float32 as in the reference: a product just under a whole number must be cut as it is there.
    return np.arange(steps, dtype=np.float32) * np.float32(second_per_grid)


def mrope_positions(
    spans: Sequence[int | VisionSpan], geometry: VisionGeometry, rule: PositionsRule = "released"
) -> torch.Tensor:
    """Positions of one sequence without padding.

    Text counts up by one in all three rows. A vision token has time, row and column of its place in the merged grid,
    each after the position at which the span begins (Qwen2.5-VL report, section 2.1.3).

    Args:
        spans: the sequence in order: a number of text tokens, or a `VisionSpan`.
        geometry: of the base model.
        rule: see `InputPolicy.positions`.

    Returns:
        [3, L] int64: time, height, width.
    """
    if not any(isinstance(span, VisionSpan) for span in spans):
        return torch.arange(sum(spans)).expand(3, -1)  # type: ignore[arg-type]
    pieces: list[np.ndarray] = []
    start = 0
    for span in spans:
        if isinstance(span, VisionSpan):
            t, h, w = span.grid[0], span.grid[1] // geometry.merge, span.grid[2] // geometry.merge
            time = np.zeros(t, np.int64)
            if span.times_s is not None:
                time = (span.times_s * np.float32(geometry.tokens_per_second)).astype(np.int64)
            grid = np.empty((3, t, h, w), np.int64)
            grid[0] = time[:, None, None]
            grid[1] = np.arange(h)[:, None]
            grid[2] = np.arange(w)
            pieces.append(grid.reshape(3, -1) + start)
            start += max(h, w) if rule == "transformers5" else max(int(time.max()) + 1, h, w)
        else:
            pieces.append(np.broadcast_to(np.arange(start, start + span), (3, span)))
            start += span
    return torch.from_numpy(np.concatenate(pieces, axis=1))
