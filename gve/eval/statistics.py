"""Bootstrap intervals over queries, and paired tests of two models.

Queries that share a video are not independent: one hard clip fails all of its captions together. Resampling is
therefore by cluster (the cluster of a query is its first positive), and a replicate is the sum of the scores drawn over
the number of queries drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np

CONFIDENCE = 0.95


def bootstrap_means(
    scores: np.ndarray, clusters: np.ndarray | None = None, *, resamples: int = 10000, seed: int = 0, name: str = ""
) -> np.ndarray:
    """Means of resampled queries.

    A replicate depends only on how often each distinct (sum, size) of a cluster is drawn, so counts are drawn from a
    multinomial over the distinct pairs: the same distribution as drawing rows, at a thousandth of the cost.

    Args:
        scores: [Q] float, score of each query, or the difference of two models.
        clusters: [Q] int, queries with one number are drawn together; None draws every query on its own.
        name: separates the draws of different sets under one seed.

    Returns:
        [resamples] float64.
    """
    if not len(scores):
        raise ValueError("no scores to resample; the set has no queries")
    _, inverse = np.unique(np.arange(len(scores)) if clusters is None else clusters, return_inverse=True)
    sums = np.bincount(inverse, weights=scores)
    sizes = np.bincount(inverse)
    kinds, frequency = np.unique(np.stack([sums, sizes]), axis=1, return_counts=True)
    key = int.from_bytes(hashlib.sha256(f"bootstrap\0{seed}\0{name}".encode()).digest()[:16], "big")
    draws = np.random.Generator(np.random.Philox(key=key)).multinomial(
        len(sums), frequency / frequency.sum(), size=resamples
    )
    return (draws @ kinds[0]) / (draws @ kinds[1])


def interval(replicates: np.ndarray) -> tuple[float, float]:
    """Central percentile interval of bootstrap replicates."""
    low, high = np.quantile(replicates, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def score_interval(scores: np.ndarray, clusters: np.ndarray, replicates: np.ndarray) -> tuple[float, float]:
    """Percentile interval of a mean of scores in [0, 1] from its bootstrap replicates.

    All hits or all misses resample to themselves, an interval of no width: there the exact binomial bound takes over
    (Clopper-Pearson: with n misses out of n clusters, the upper bound is 1 - (alpha / 2) ** (1 / n)).
    """
    bound = ((1 - CONFIDENCE) / 2) ** (1 / len(np.unique(clusters)))
    if np.all(scores == 0):
        return 0.0, 1 - bound
    if np.all(scores == 1):
        return bound, 1.0
    return interval(replicates)


def p_value(differences: np.ndarray) -> float:
    """Two-sided bootstrap p-value of "no difference" from replicates of the mean difference.

    It is never 0: with R resamples the smallest that can be claimed is 2 / (R + 1).
    """
    below = (np.count_nonzero(differences <= 0) + 1) / (len(differences) + 1)
    above = (np.count_nonzero(differences >= 0) + 1) / (len(differences) + 1)
    return float(min(1.0, 2 * min(below, above)))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjustment: significant at level a after it means family-wise error at most a."""
    adjusted: dict[str, float] = {}
    running = 0.0
    for place, (name, p) in enumerate(sorted(p_values.items(), key=lambda entry: entry[1])):
        running = max(running, min(1.0, (len(p_values) - place) * p))
        adjusted[name] = running
    return adjusted
