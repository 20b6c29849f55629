"""Samples of a stream of any length that depend on ids and seed alone."""

from __future__ import annotations

import heapq
from typing import Generic, TypeVar

from gve.synth.profiles import chance

Entry = TypeVar("Entry")


class Drawn(Generic[Entry]):
    """The entries with the smallest draws among all that were offered: every one has the same chance.

    Args:
        size: most entries.
        seed: of the draws.
        purpose: separates samples under one seed.
    """

    def __init__(self, size: int, seed: int, purpose: str) -> None:
        self._size, self._seed, self._purpose = size, seed, purpose
        self._heap: list[tuple[float, str, Entry]] = []  # the largest draw, negated, first
        self.offered = 0

    def offer(self, id: str, entry: Entry) -> None:
        """Takes the entry in if its draw is small enough; ids are unique."""
        self.offered += 1
        drawn = (-chance(self._seed, self._purpose, id), id, entry)
        if len(self._heap) < self._size:
            heapq.heappush(self._heap, drawn)
        elif self._size:
            heapq.heappushpop(self._heap, drawn)

    def entries(self) -> list[Entry]:
        """The sample, by rising draw, so that a smaller sample is the beginning of a larger one."""
        return [entry for *_, entry in sorted(self._heap, key=lambda drawn: (-drawn[0], drawn[1]))]
