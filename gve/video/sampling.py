"""Which frames of a clip are looked at."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

from gve.items import InputError


@dataclass(frozen=True)
class Sampling:
    """Which frames of a clip are looked at.

    Args:
        kind: "uniform" takes `num_frames` frames spread over the whole clip; "fps" takes duration_s * fps frames, even,
            clamped to [min_frames, num_frames], spread over the whole clip in the same way (gve.md section 2).
        num_frames: frames (uniform), or the most frames (fps). Even: the tower merges frames in pairs.
        fps: frames per second of the clip's length, in Hz; fps only.
        min_frames: the fewest frames, even; fps only.

    Raises:
        InputError: a count is odd or out of order, or the rate is not positive.
    """

    kind: Literal["uniform", "fps"] = "uniform"
    num_frames: int = 8
    fps: float = 1.0
    min_frames: int = 4

    def __post_init__(self) -> None:
        if self.kind not in ("uniform", "fps"):
            raise InputError(f"sampling kind {self.kind!r} is unknown; use uniform or fps")
        counts = [self.num_frames] + ([self.min_frames] if self.kind == "fps" else [])
        for count in counts:
            if count < 2 or count % 2:
                raise InputError(f"{count} frames: the count of frames must be even and at least 2")
        if self.kind == "fps" and not (self.fps > 0 and np.isfinite(self.fps)):
            raise InputError(f"fps {self.fps} must be a positive number of frames per second")
        if self.kind == "fps" and self.min_frames > self.num_frames:
            raise InputError(f"min_frames {self.min_frames} is more than the most frames, {self.num_frames}")

    @classmethod
    def uniform(cls, num_frames: int) -> Sampling:
        return cls("uniform", num_frames)

    @classmethod
    def every(cls, fps: float, max_frames: int, min_frames: int = 4) -> Sampling:
        return cls("fps", max_frames, fps, min_frames)

    @classmethod
    def parse(cls, text: str) -> Sampling:
        """The inverse of str(): "uniform(8)", "fps(1,8)" or "fps(0.5,16,2)"."""
        match = re.fullmatch(r"uniform\((\d+)\)|fps\(([\d.]+),(\d+)(?:,(\d+))?\)", text.replace(" ", ""))
        if match is None:
            raise InputError(f"sampling {text!r} is unknown; write uniform(8) or fps(1,8)")
        count, fps, most, fewest = match.groups()
        return cls.uniform(int(count)) if count else cls.every(float(fps), int(most), int(fewest or 4))

    def __str__(self) -> str:
        if self.kind == "uniform":
            return f"uniform({self.num_frames})"
        return f"fps({self.fps:g},{self.num_frames}" + (f",{self.min_frames})" if self.min_frames != 4 else ")")


def frame_indices(num_frames: int, native_fps: float, sampling: Sampling) -> np.ndarray:
    """Indices of the sampled frames: the one rule of training, evaluation, search and export.

    linspace(0, N - 1, n).round(), as the released pipeline. A clip of fewer than n frames repeats them evenly.

    Args:
        num_frames: N, frames in the clip.
        native_fps: average rate of the clip, in Hz.

    Returns:
        [n] int64, never falling, n even.
    """
    if num_frames < 1:
        raise InputError(f"{num_frames} frames: a clip has at least 1 frame")
    count = sampling.num_frames
    if sampling.kind == "fps":
        if not native_fps > 0:
            raise InputError(f"a rate of {native_fps} frames per second: the sampling {sampling} needs the clip's rate")
        wanted = num_frames / native_fps * sampling.fps
        count = int(min(max(wanted, sampling.min_frames), sampling.num_frames)) // 2 * 2
    return np.linspace(0, num_frames - 1, count).round().astype(np.int64)
