"""Bootstrap intervals over queries, paired tests of two models, and correlations over models.

Queries that share a video are not independent: one hard clip fails all of its captions together. Resampling is
therefore by cluster (the cluster of a query is its first positive), and a replicate is the sum of the scores drawn over
the number of queries drawn. Sets that share videos (CRB-G/S/T, VDC-O/D, ...) are drawn together for the same reason:
apart, the interval of their mean would be too narrow.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from statistics import NormalDist

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

    Raises:
        ValueError: there are no scores.
    """
    if not len(scores):
        raise ValueError("no scores to resample; the set has no queries")
    _, inverse = np.unique(np.arange(len(scores)) if clusters is None else clusters, return_inverse=True)
    table = np.stack([np.bincount(inverse, weights=scores), np.bincount(inverse)])
    sums, sizes = _resampled_totals(table, resamples, seed, name)
    return sums / sizes


def _resampled_totals(table: np.ndarray, resamples: int, seed: int, name: str) -> np.ndarray:
    """[rows, resamples] totals of `table` [rows, clusters] over clusters drawn with replacement."""
    kinds, frequency = np.unique(table, axis=1, return_counts=True)
    key = int.from_bytes(hashlib.sha256(f"bootstrap\0{seed}\0{name}".encode()).digest()[:16], "big")
    draws = np.random.Generator(np.random.Philox(key=key)).multinomial(
        table.shape[1], frequency / frequency.sum(), size=resamples
    )
    return kinds @ draws.T


def joint_bootstrap_means(
    scores: Mapping[str, np.ndarray], clusters: Mapping[str, np.ndarray], *, resamples: int = 10000, seed: int = 0
) -> dict[str, np.ndarray]:
    """Means of resampled queries of several sets, for statistics over them such as the mean of an ability.

    Sets that share a cluster, directly or through a third, are resampled together: a video that is drawn twice counts
    twice in each of them. A set that shares none gets the same replicates as from `bootstrap_means`.

    Args:
        scores: set -> [Q] float.
        clusters: set -> [Q] int; equal numbers in two sets are one video.

    Returns:
        Set -> [resamples] float64; replicate i of all sets belongs together.
    """
    replicates = {}
    for group in _connected({name: set(np.unique(own).tolist()) for name, own in clusters.items() if name in scores}):
        if len(group) == 1:
            (name,) = group
            replicates[name] = bootstrap_means(scores[name], clusters[name], resamples=resamples, seed=seed, name=name)
            continue
        _, inverse = np.unique(np.concatenate([clusters[name] for name in group]), return_inverse=True)
        ends = np.cumsum([len(clusters[name]) for name in group])[:-1]
        columns = int(inverse.max()) + 1
        table = np.concatenate(
            [
                [np.bincount(rows, scores[name], columns), np.bincount(rows, minlength=columns)]
                for name, rows in zip(group, np.split(inverse, ends), strict=True)
            ]
        )
        totals = _resampled_totals(table, resamples, seed, " ".join(group))
        for place, name in enumerate(group):
            # A replicate may draw no query of a set that covers few of the group's videos; it then says nothing new.
            sums, sizes = totals[2 * place], totals[2 * place + 1]
            replicates[name] = np.where(sizes > 0, sums / np.maximum(sizes, 1), scores[name].mean())
    return {name: replicates[name] for name in scores}


def _connected(members: Mapping[str, set[int]]) -> Iterable[list[str]]:
    """Groups of names whose member sets touch, in the order of the names."""
    groups: list[tuple[list[str], set[int]]] = []
    for name, own in members.items():
        touching = [group for group in groups if group[1] & own]
        names = [other for group in touching for other in group[0]] + [name]
        groups = [group for group in groups if group not in touching]
        groups.append((names, own.union(*(group[1] for group in touching))))
    order = list(members)
    return [sorted(names, key=order.index) for names, _ in groups]


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


def difference_interval(differences: np.ndarray, clusters: np.ndarray, replicates: np.ndarray) -> tuple[float, float]:
    """Percentile interval of a mean of paired differences in [-1, 1] from its bootstrap replicates.

    Where no query differs the replicates are all 0. The true difference need not be: with 95% confidence fewer than
    1 - (alpha / 2) ** (1 / n) of the clusters differ (Clopper-Pearson), which bounds it on both sides.
    """
    if np.all(differences == 0):
        bound = 1 - ((1 - CONFIDENCE) / 2) ** (1 / len(np.unique(clusters)))
        return -bound, bound
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


def pearson(first: np.ndarray, second: np.ndarray) -> float:
    """Correlation of two [M] series; NaN where one of them is constant."""
    a, b = first - first.mean(), second - second.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale > 0 else float("nan")


def correlation_interval(r: float, count: int) -> tuple[float, float]:
    """95% interval of a Pearson correlation by Fisher's z: tanh(atanh(r) +- 1.96 / sqrt(count - 3)).

    Exact enough down to six pairs if these are independent and roughly normal, where a percentile bootstrap over so
    few is too narrow. Models of one family are not independent, so in truth it is wider still.

    Args:
        count: number of pairs, at least 4.
    """
    if count < 4:
        raise ValueError(f"{count} pairs carry no interval of a correlation; at least 4 do")
    middle = np.arctanh(np.clip(r, -1 + 1e-15, 1 - 1e-15))
    reach = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) / np.sqrt(count - 3)
    return float(np.tanh(middle - reach)), float(np.tanh(middle + reach))
