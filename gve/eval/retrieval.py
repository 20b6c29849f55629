"""Retrieval metrics of one query from counts alone, exact under ties.

A query scores 1 when a positive is among the first k. Candidates with one similarity have no order, so the score is the
expectation over all their orders; the best and the worst order stand beside it. Precision at 1 of a pool is recall at 1
by this definition.
"""

from __future__ import annotations

import numpy as np

from gve.encode.topk import RankCounts


def _expected_hit(drawn: np.ndarray, positives: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """P(a positive among `drawn` of `candidates` taken at random) = 1 - C(C-p, m) / C(C, m), as a product of ratios."""
    miss = np.ones(len(drawn))
    for taken in range(int(drawn.max(initial=0))):
        others = np.maximum(candidates - positives - taken, 0)
        miss = np.where(taken < drawn, miss * others / np.maximum(candidates - taken, 1), miss)
    return 1.0 - miss


def recall_at_k(counts: RankCounts, k: int) -> np.ndarray:
    """[Q] float64: probability that a positive is among the first k under a random order of ties (hypergeometric)."""
    drawn = np.clip(k - counts.greater, 0, counts.tied)
    return _expected_hit(drawn, counts.tied_positives, counts.tied)


def optimistic_recall_at_k(counts: RankCounts, k: int) -> np.ndarray:
    """[Q] float64: the same if every tie falls in favour of the positives."""
    return ((counts.greater < k) & (counts.tied_positives > 0)).astype(np.float64)


def pessimistic_recall_at_k(counts: RankCounts, k: int) -> np.ndarray:
    """[Q] float64: the same if every tie falls against them."""
    others = counts.tied - counts.tied_positives
    return ((counts.greater + others < k) & (counts.tied_positives > 0)).astype(np.float64)


def chance_recall_at_k(num_positives: np.ndarray, num_candidates: np.ndarray, k: int) -> float:
    """Mean recall at k of a random order: mean(1 - C(C-p, k) / C(C, k)).

    Args:
        num_positives: [Q] int, p of each query.
        num_candidates: [Q] int, C of each query: its pool, or the whole corpus.
    """
    drawn = np.minimum(k, num_candidates)
    return float(_expected_hit(drawn, num_positives, num_candidates).mean())
