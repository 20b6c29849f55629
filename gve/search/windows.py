"""How a long video becomes clips: overlapping windows of a fixed length, none of them cut out of the file."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gve.items import InputError


@dataclass(frozen=True)
class Windows:
    """The window policy of an index.

    Args:
        length_s: of a window, in seconds; 0 makes every file one clip.
        stride_s: from the start of a window to that of the next, in seconds; at most the length, so nothing falls
            between two windows.

    Raises:
        InputError: a value is out of range.
    """

    length_s: float = 10.0
    stride_s: float = 5.0

    def __post_init__(self) -> None:
        if not 0 <= self.length_s < math.inf:
            raise InputError(f"window {self.length_s:g} s: give a positive length, or 0 for whole files")
        if self.length_s and not 0 < self.stride_s <= self.length_s:
            raise InputError(
                f"stride {self.stride_s:g} s must be above 0 and at most the window of {self.length_s:g} s: "
                "what lies between two windows would never be found"
            )

    def spans(self, duration_s: float) -> list[tuple[float, float]]:
        """(Start, end) of each window in seconds.

        Windows start at multiples of the stride and the last one ends with the file: a rest of less than half a
        stride lengthens it, a longer rest is a window of its own. So a window is at most half a stride longer or
        shorter than it should be, and only the last of a file is.

        Args:
            duration_s: of the file.
        """
        if not self.length_s or duration_s <= self.length_s:
            return [(0.0, duration_s)]
        more = math.floor((duration_s - self.length_s) / self.stride_s + 0.5)
        starts = [self.stride_s * number for number in range(more + 1)]
        return [*((start, start + self.length_s) for start in starts[:-1]), (starts[-1], duration_s)]

    def __str__(self) -> str:
        return f"windows of {self.length_s:g} s every {self.stride_s:g} s" if self.length_s else "whole files"
