"""The fixed pairs by which a prober scores a unit of the curriculum: which rows, and reading them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch.utils.data import Dataset

from gve.data.loader import thinned
from gve.data.plan import PlannedSource, permutation
from gve.data.sources import Source
from gve.items import Pair
from gve.video import Sampling


class ProbePairs(Dataset[Pair]):
    """Pairs of one unit, read by number as training reads them, without negatives; pickles small, for loader workers.

    Args:
        rows: (source, row) of each pair.
        sampling: frames of a clip that the run asks for; a source may store more.
    """

    def __init__(self, rows: Sequence[tuple[Source, int]], sampling: Sampling) -> None:
        self._rows, self._sampling = list(rows), sampling

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Pair:
        """Reads one pair.

        Raises:
            InputError: its bytes are not the ones that were indexed, or a stored frame cannot be decoded.
            OSError: the shard cannot be read.
        """
        source, row = self._rows[number]
        pair = source.read(row)
        query, target = (thinned(source, item, self._sampling) for item in (pair.query, pair.target))
        return replace(pair, query=query, target=target, negatives=())

    @property
    def keys(self) -> list[str]:
        """Sample keys, in order."""
        return [source.key(row) for source, row in self._rows]


def probe_rows(sources: Sequence[PlannedSource], count: int, seed: int) -> list[tuple[int, int]]:
    """Chooses the pairs of one unit among its training rows, never among dev rows.

    A source's rows are the first of one permutation of its own: the same in every epoch and for every `unit`, and a
    larger count keeps the pairs of a smaller one.

    Args:
        sources: of the unit.
        count: pairs wanted (N_p of the paper); a smaller unit gives all it has.
        seed: of the run.

    Returns:
        (index among `sources`, row) of each pair.
    """
    chosen = []
    for k, (source, share) in enumerate(zip(sources, allot(count, [source.size for source in sources]), strict=True)):
        training = np.setdiff1d(np.arange(int(source.shard_sizes.sum())), source.held_out, assume_unique=True)
        order = permutation(len(training), seed, "probe", source.name)[:share]
        chosen += [(k, int(row)) for row in training[order]]
    return chosen


def allot(count: int, sizes: Sequence[int]) -> list[int]:
    """Splits a count in proportion to sizes (largest remainder), so that as many as it allows have at least 1."""
    total = sum(sizes)
    if count >= total:
        return list(sizes)
    shares = [count * size // total for size in sizes]
    # In whole numbers: remainders of equal size are level, and the first source wins.
    by_remainder = sorted(range(len(sizes)), key=lambda k: (-(count * sizes[k] % total), k))
    for k in by_remainder[: count - sum(shares)]:
        shares[k] += 1
    for k, size in enumerate(sizes):
        if not shares[k] and size and max(shares) > 1:
            shares[shares.index(max(shares))] -= 1
            shares[k] = 1
    return shares
