"""Exact search over a corpus of embeddings: where each query's best positive stands, and the top K.

Similarities are fp32 dot products in blocks; nothing is approximated. Equal corpus vectors are scored once and their
similarity copied: a matrix product may round one vector differently in different columns, and ties (and with them
scores) would then depend on the order of the corpus.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

SCORES_PER_BLOCK = 1 << 24  # 64 MiB of fp32 similarities at a time


@dataclass(frozen=True, eq=False)
class RankCounts:
    """Where the best positive of each query stands, ties counted and not broken.

    Args:
        greater: [Q] int64, candidates with a similarity above the best positive's.
        tied: [Q] int64, candidates with exactly its similarity, itself and other positives among them.
        tied_positives: [Q] int64, the positives among `tied`; 0 where a query has no readable positive: a miss.
    """

    greater: np.ndarray
    tied: np.ndarray
    tied_positives: np.ndarray


def _blocks(queries: np.ndarray, corpus: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(First query, similarities [b, C]) of consecutive blocks of queries; NaN becomes -inf, which nothing falls below.

    Raises:
        ValueError: the shapes do not fit.
    """
    if queries.ndim != 2 or corpus.ndim != 2 or queries.shape[1] != corpus.shape[1]:
        raise ValueError(f"queries {queries.shape} and corpus {corpus.shape} must be [Q, D] and [C, D] of one D")
    rows = np.ascontiguousarray(corpus, np.float32) + np.float32(0)  # -0.0 becomes 0.0: equal values have equal bytes
    as_bytes = rows.view(np.dtype((np.void, rows.shape[1] * rows.itemsize))).ravel()
    _, first, inverse = np.unique(as_bytes, return_index=True, return_inverse=True)
    distinct = rows[first].T  # sorted by value: the order of the corpus leaves no trace in the rounding
    step = max(1, SCORES_PER_BLOCK // max(1, len(corpus)))
    for start in range(0, len(queries), step):
        scores = np.asarray(queries[start : start + step], np.float32) @ distinct
        scores[np.isnan(scores)] = -np.inf
        yield start, scores[:, inverse.ravel()]


def rank_counts(
    queries: np.ndarray,
    corpus: np.ndarray,
    positives: Sequence[Sequence[int]],
    pools: Sequence[Sequence[int]] | None = None,
) -> RankCounts:
    """Counts the candidates above and level with the best positive of every query.

    Args:
        queries: [Q, D] float32.
        corpus: [C, D] float32. A row of NaN is an item that could not be read: it is never retrieved, and a query whose
            positives are all unread, or that is NaN itself, is a miss.
        positives: corpus rows that answer each query.
        pools: corpus rows each query is ranked against, positives included; None is the whole corpus.

    Raises:
        ValueError: shapes or lengths disagree, or a row is outside the corpus.
    """
    if len(positives) != len(queries) or (pools is not None and len(pools) != len(queries)):
        raise ValueError(f"{len(queries)} queries need as many lists of positives and pools")
    for listed in (*positives, *(pools or ())):
        if any(not 0 <= row < len(corpus) for row in listed):
            raise ValueError(f"corpus rows {list(listed)} are not all within 0..{len(corpus) - 1}")
    greater, tied, tied_positives = (np.zeros(len(queries), np.int64) for _ in range(3))
    for start, scores in _blocks(queries, corpus):
        for query, line in enumerate(scores, start):
            own = line[sorted(set(positives[query]))]
            best = own.max(initial=-np.inf)
            if np.isneginf(best):
                continue
            candidates = line if pools is None else line[sorted(set(pools[query]))]
            greater[query] = np.count_nonzero(candidates > best)
            tied[query] = np.count_nonzero(candidates == best)
            tied_positives[query] = np.count_nonzero(own == best)
    return RankCounts(greater, tied, tied_positives)


def top_k(
    queries: np.ndarray,
    corpus: np.ndarray,
    k: int,
    pools: Sequence[Sequence[int]] | None = None,
    *,
    excluded: Sequence[np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest corpus rows of every query, by falling similarity and, where that is equal, rising row.

    Args:
        queries: [Q, D] float32.
        corpus: [C, D] float32; rows of NaN come last.
        k: how many; at most C are given.
        pools: corpus rows each query may take from; None is the whole corpus.
        excluded: corpus rows each query never takes.

    Returns:
        rows [Q, k] int64, -1 where fewer than k may be taken, and similarities [Q, k] float32, -inf there.
    """
    k = min(k, len(corpus))
    rows = np.full((len(queries), k), -1, np.int64)
    similarities = np.full((len(queries), k), -np.inf, np.float32)
    for start, scores in _blocks(queries, corpus):
        for query, line in enumerate(scores, start):
            candidates = np.arange(len(corpus)) if pools is None else np.unique(np.asarray(pools[query], np.int64))
            if excluded is not None:
                candidates = candidates[~np.isin(candidates, excluded[query])]
            values = line[candidates]
            if len(values) > k:  # keep all that is level with place k: ties are cut by row, not by the partition
                near = values >= np.partition(values, len(values) - k)[len(values) - k]
                candidates, values = candidates[near], values[near]
            order = np.lexsort((candidates, -values))[:k]
            rows[query, : len(order)] = candidates[order]
            similarities[query, : len(order)] = values[order]
    return rows, similarities
