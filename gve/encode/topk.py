"""Exact search over a corpus of embeddings: where each query's best positive stands, and the top K.

Similarities are fp32 dot products in blocks; nothing is approximated. Equal corpus vectors are scored once: a matrix
product may round one vector differently in different columns, and ties (and with them scores) would then depend on
where an item stands in the corpus. Distinct vectors are scored in the order of a hash of their values, so the order of
the corpus leaves no trace in the rounding either.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

SCORES_PER_BLOCK = 1 << 24  # 64 MiB of fp32 similarities at a time, and the largest piece of memory of a search
_COLUMNS = 1024  # corpus vectors copied side by side for one matrix product


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


class _Corpus:
    """Distinct vectors of a corpus: U columns of a block of similarities.

    Args:
        vectors: [C, D]; equal rows share a column.
    """

    def __init__(self, vectors: np.ndarray) -> None:
        self.vectors = vectors
        # + 0 turns -0.0 into 0.0: equal values have equal bytes. A row at a time: no copy of the corpus.
        digests = np.array(
            [hashlib.blake2b((row + np.float32(0)).tobytes(), digest_size=16).digest() for row in vectors], "S16"
        )
        # Void and not bytes: numpy drops trailing zeros of bytes, and two hashes would become one.
        _, self.first, self.column = np.unique(digests.view("V16"), return_index=True, return_inverse=True)
        self.column = self.column.ravel()
        self.copies = np.bincount(self.column, minlength=len(self.first))
        self._members = np.argsort(self.column, kind="stable")
        self._starts = np.concatenate([[0], np.cumsum(self.copies)])

    def rows(self, columns: np.ndarray) -> np.ndarray:
        """All corpus rows of the columns."""
        if len(self.first) == len(self.vectors):
            return self.first[columns]
        return np.concatenate(
            [np.empty(0, np.int64), *(self._members[self._starts[own] : self._starts[own + 1]] for own in columns)]
        )

    def blocks(self, queries: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """(First query, similarities [b, U]) of consecutive blocks of queries; NaN becomes -inf.

        The block is overwritten by the next one.
        """
        distinct = len(self.first)
        step = min(len(queries), max(1, SCORES_PER_BLOCK // max(1, distinct)))
        block = np.empty((step, distinct), np.float32)
        for start in range(0, len(queries), max(1, step)):
            rows = np.ascontiguousarray(queries[start : start + step], np.float32)
            scores = block[: len(rows)]
            for left in range(0, distinct, _COLUMNS):
                some = self.vectors[self.first[left : left + _COLUMNS]]
                scores[:, left : left + _COLUMNS] = rows @ some.T
            np.copyto(scores, -np.inf, where=np.isnan(scores))
            yield start, scores


def _checked(queries: np.ndarray, corpus: np.ndarray) -> tuple[np.ndarray, _Corpus]:
    if queries.ndim != 2 or corpus.ndim != 2 or queries.shape[1] != corpus.shape[1]:
        raise ValueError(f"queries {queries.shape} and corpus {corpus.shape} must be [Q, D] and [C, D] of one D")
    return np.asarray(queries, np.float32), _Corpus(np.asarray(corpus, np.float32))


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
    return search(queries, corpus, positives, 0, pools).counts


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

    Raises:
        ValueError: the shapes do not fit.
    """
    queries, items = _checked(queries, corpus)
    nearest = _Nearest(len(queries), min(k, len(corpus)))
    for start, scores in items.blocks(queries):
        for query, line in enumerate(scores, start):
            kept = None if pools is None else np.unique(np.asarray(pools[query], np.int64))
            if excluded is not None and len(excluded[query]):
                kept = np.arange(len(corpus)) if kept is None else kept
                kept = kept[~np.isin(kept, excluded[query])]
            nearest.take(query, line, items, kept)
    return nearest.rows, nearest.similarities


@dataclass(frozen=True, eq=False)
class Ranking:
    """Both views of one search.

    Args:
        counts: where the best positive of each query stands.
        nearest: [Q, k] int64, corpus rows by falling similarity, -1 beyond the end of a pool.
        similarities: [Q, k] float32, -inf there.
        num_distinct: different vectors of the corpus, those of unread items not counted; 1 is a collapsed model.
    """

    counts: RankCounts
    nearest: np.ndarray
    similarities: np.ndarray
    num_distinct: int


def search(
    queries: np.ndarray,
    corpus: np.ndarray,
    positives: Sequence[Sequence[int]],
    k: int,
    pools: Sequence[Sequence[int]] | None = None,
) -> Ranking:
    """`rank_counts` and `top_k` of the same similarities, computed once.

    15,000 queries over 15,000 items of 3,584 dimensions are 1.6 TFLOP; beside its arguments it needs one block of
    similarities (64 MiB) and some 50 MiB.

    Raises:
        ValueError: shapes or lengths disagree, or a row is outside the corpus.
    """
    queries, items = _checked(queries, corpus)
    if len(positives) != len(queries) or (pools is not None and len(pools) != len(queries)):
        raise ValueError(f"{len(queries)} queries need as many lists of positives and pools")
    for listed in (*positives, *(pools or ())):
        if len(listed) and not (min(listed) >= 0 and max(listed) < len(corpus)):
            raise ValueError(f"corpus rows {list(listed)} are not all within 0..{len(corpus) - 1}")
    greater, tied, tied_positives = (np.zeros(len(queries), np.int64) for _ in range(3))
    nearest = _Nearest(len(queries), min(k, len(corpus)))
    single = len(items.first) == len(corpus)  # no copies: counting columns is counting rows
    for start, scores in items.blocks(queries):
        for query, line in enumerate(scores, start):
            pool = None if pools is None else np.unique(np.asarray(pools[query], np.int64))
            nearest.take(query, line, items, pool)
            own = line[items.column[sorted(set(positives[query]))]]
            best = own.max(initial=-np.inf)
            if np.isneginf(best):
                continue
            if pool is None and not single:
                greater[query] = items.copies[line > best].sum()
                tied[query] = items.copies[line == best].sum()
            else:
                candidates = line if pool is None else line[items.column[pool]]
                greater[query] = np.count_nonzero(candidates > best)
                tied[query] = np.count_nonzero(candidates == best)
            tied_positives[query] = np.count_nonzero(own == best)
    num_distinct = int(np.count_nonzero(np.isfinite(items.vectors[items.first, 0])))
    return Ranking(RankCounts(greater, tied, tied_positives), nearest.rows, nearest.similarities, num_distinct)


class _Nearest:
    """The k nearest rows of each query, filled line by line."""

    def __init__(self, queries: int, k: int) -> None:
        self.k = k
        self.rows = np.full((queries, k), -1, np.int64)
        self.similarities = np.full((queries, k), -np.inf, np.float32)

    def take(self, query: int, line: np.ndarray, items: _Corpus, kept: np.ndarray | None) -> None:
        """Fills in one query.

        Args:
            line: [U] similarities of the corpus' columns.
            kept: [n] int64, rising corpus rows that may be taken; None for all.
        """
        if not self.k:
            return
        if kept is None:  # every column has a row, so what is level with the k-th column holds the k nearest rows
            few = self.k >= len(line)
            level = -np.inf if few else np.partition(line, len(line) - self.k)[len(line) - self.k]
            kept = items.rows(np.flatnonzero(line >= level))
        values = line[items.column[kept]]
        if len(values) > self.k:  # ties are cut by row, not by the partition
            near = values >= np.partition(values, len(values) - self.k)[len(values) - self.k]
            kept, values = kept[near], values[near]
        order = np.lexsort((kept, -values))[: self.k]
        self.rows[query, : len(order)] = kept[order]
        self.similarities[query, : len(order)] = values[order]
