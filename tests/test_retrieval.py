"""Ranks and metrics against brute force, torchmetrics and hand calculation; intervals against simulation."""

from __future__ import annotations

from itertools import pairwise, permutations

import numpy as np
import pytest
import torch
from torchmetrics.functional.retrieval import retrieval_hit_rate

from gve.encode.topk import RankCounts, rank_counts, top_k
from gve.eval.retrieval import chance_recall_at_k, optimistic_recall_at_k, pessimistic_recall_at_k, recall_at_k
from gve.eval.statistics import bootstrap_means, holm, interval, p_value, score_interval


def brute_force(scores: np.ndarray, positives: set[int], k: int) -> tuple[float, float, float]:
    """(mean, best, worst) hit over every order of the candidates that sorts their scores."""
    hits = [
        float(any(row in positives for row in order[:k]))
        for order in permutations(range(len(scores)))
        if all(scores[a] >= scores[b] for a, b in pairwise(order))
    ]
    return float(np.mean(hits)), max(hits), min(hits)


def tied_problem(seed: int) -> tuple[np.ndarray, np.ndarray, list[list[int]]]:
    """Small whole numbers: many exact ties, and as many negative similarities as positive ones."""
    rng = np.random.default_rng(seed)
    queries = rng.integers(-1, 2, (12, 3)).astype(np.float32)
    corpus = rng.integers(-1, 2, (6, 3)).astype(np.float32)
    positives = [sorted(rng.choice(6, rng.integers(1, 4), replace=False).tolist()) for _ in queries]
    return queries, corpus, positives


@pytest.mark.parametrize("k", [1, 2, 4])
def test_ranks_equal_brute_force(k: int) -> None:
    ignoring_ties = 0
    for seed in range(4):
        queries, corpus, positives = tied_problem(seed)
        counts = rank_counts(queries, corpus, positives)
        expected = np.array(
            [brute_force(q @ corpus.T, set(own), k) for q, own in zip(queries, positives, strict=True)]
        ).T
        got = (recall_at_k(counts, k), optimistic_recall_at_k(counts, k), pessimistic_recall_at_k(counts, k))
        np.testing.assert_allclose(got, expected, atol=1e-12)
        # Negative control: the usual "1 + number above" is the optimistic value and fails the same comparison.
        ignoring_ties += int(not np.allclose((counts.greater < k).astype(float), expected[0], atol=1e-12))
    assert ignoring_ties == 4


def test_pools_equal_brute_force() -> None:
    queries, corpus, positives = tied_problem(9)
    rng = np.random.default_rng(1)
    pools = [sorted({*own, *rng.choice(6, 3).tolist()}) for own in positives]
    counts = rank_counts(queries, corpus, positives, pools)
    for row, (own, pool) in enumerate(zip(positives, pools, strict=True)):
        inside = {place for place, item in enumerate(pool) if item in own}
        assert recall_at_k(counts, 1)[row] == pytest.approx(brute_force(queries[row] @ corpus[pool].T, inside, 1)[0])


def test_torchmetrics_agrees_where_it_is_right() -> None:
    """On positive scores without ties; on negative ones torchmetrics drops targets, which is why it is not used."""
    rng = np.random.default_rng(0)
    queries, corpus = np.abs(rng.normal(size=(2, 30, 8))).astype(np.float32)
    positives = [rng.choice(30, 2, replace=False).tolist() for _ in queries]
    for k in (1, 10):
        ours = recall_at_k(rank_counts(queries, corpus, positives), k)
        for row, own in enumerate(positives):
            target = torch.zeros(30, dtype=torch.bool)
            target[own] = True
            assert ours[row] == retrieval_hit_rate(torch.from_numpy(corpus @ queries[row]), target, top_k=k).item()


def test_constant_vectors_score_chance() -> None:
    positives = [[row] for row in range(50)]
    counts = rank_counts(np.ones((50, 4), np.float32), np.ones((200, 4), np.float32), positives)
    np.testing.assert_allclose(recall_at_k(counts, 10), 10 / 200, rtol=1e-12)
    assert optimistic_recall_at_k(counts, 1).mean() == 1
    assert pessimistic_recall_at_k(counts, 10).mean() == 0


def test_equal_vectors_tie_wherever_they_stand_and_the_order_of_the_corpus_is_nothing() -> None:
    rng = np.random.default_rng(3)
    corpus = rng.normal(size=(997, 67)).astype(np.float32)
    corpus[rng.choice(997, 300, replace=False)] = corpus[5]
    corpus[corpus == 0] = -0.0
    queries = rng.normal(size=(20, 67)).astype(np.float32)
    counts = rank_counts(queries, corpus, [[5]] * 20)
    assert (counts.tied >= 300).all()
    order = rng.permutation(997)
    place = int(np.argwhere(order == 5)[0, 0])
    moved = rank_counts(queries, corpus[order], [[place]] * 20)
    for name in ("greater", "tied", "tied_positives"):
        np.testing.assert_array_equal(getattr(counts, name), getattr(moved, name))


def test_unreadable_items_are_never_found() -> None:
    corpus = np.eye(4, dtype=np.float32)
    corpus[1] = np.nan
    queries = np.eye(4, dtype=np.float32)
    queries[3] = np.nan
    counts = rank_counts(queries, corpus, [[0], [1], [2, 1], [3]])
    assert recall_at_k(counts, 4).tolist() == [1, 0, 1, 0]
    assert pessimistic_recall_at_k(counts, 4).tolist() == [1, 0, 1, 0]


def test_bad_rows_are_refused() -> None:
    ones = np.ones((2, 3), np.float32)
    with pytest.raises(ValueError, match="within"):
        rank_counts(ones, ones, [[0], [2]])
    with pytest.raises(ValueError, match="lists"):
        rank_counts(ones, ones, [[0]])
    with pytest.raises(ValueError, match="one D"):
        rank_counts(ones, ones[:, :2], [[0], [1]])


def test_top_k_equals_a_full_sort() -> None:
    queries, corpus, _ = tied_problem(2)
    corpus = np.concatenate([corpus, corpus, -corpus])
    pools = [list(range(row % 5, 18, 3)) for row in range(len(queries))]
    for used in (None, pools):
        rows, similarities = top_k(queries, corpus, 5, used)
        for row, query in enumerate(queries):
            candidates = used[row] if used else range(18)
            full = sorted((-float(query @ corpus[item]), item) for item in candidates)[:5]
            assert rows[row].tolist() == [item for _, item in full]
            assert similarities[row].tolist() == [-score for score, _ in full]
    assert top_k(queries, corpus, 5, [[1, 0]] * 12)[0][0].tolist()[2:] == [-1, -1, -1]


def test_chance_by_hand() -> None:
    # C = 4, p = 2: k = 1 gives 1/2; k = 2 gives 1 - C(2,2) / C(4,2) = 5/6; k = 3 cannot miss.
    for k, expected in ((1, 1 / 2), (2, 5 / 6), (3, 1.0)):
        assert chance_recall_at_k(np.array([2]), np.array([4]), k) == pytest.approx(expected, abs=1e-12)
    # A mean over queries; and p = 1 is k / C.
    assert chance_recall_at_k(np.array([1, 2]), np.array([10, 4]), 1) == pytest.approx((0.1 + 0.5) / 2)


def test_expectation_by_hand() -> None:
    # 3 above, 5 level of which 2 right, k = 5: two places are drawn from five: 1 - C(3,2) / C(5,2) = 0.7.
    counts = RankCounts(np.array([3]), np.array([5]), np.array([2]))
    assert recall_at_k(counts, 5)[0] == pytest.approx(0.7)
    assert recall_at_k(counts, 3)[0] == 0


def test_bootstrap_draws_rows_of_clusters() -> None:
    """The multinomial shortcut has the mean and the spread of drawing clusters one by one."""
    rng = np.random.default_rng(0)
    scores, clusters = rng.choice([0, 0.25, 1], 90), np.repeat(np.arange(30), 3)
    got = bootstrap_means(scores, clusters, resamples=20000)
    drawn = rng.integers(0, 30, (20000, 30))
    slow = scores.reshape(30, 3)[drawn].mean((1, 2))
    assert got.mean() == pytest.approx(slow.mean(), abs=0.002)
    assert got.std() == pytest.approx(slow.std(), rel=0.03)
    assert np.array_equal(got, bootstrap_means(scores, clusters, resamples=20000))
    # Queries that fail together tell less: one score a cluster, three times over.
    together = np.repeat(rng.choice([0.0, 1.0], 30), 3)
    wide, narrow = bootstrap_means(together, clusters).std(), bootstrap_means(together).std()
    assert wide == pytest.approx(narrow * 3**0.5, rel=0.1)


def test_interval_covers() -> None:
    rng = np.random.default_rng(1)
    inside = 0
    for trial in range(300):
        scores = (rng.random(150) < 0.3).astype(float)
        low, high = score_interval(scores, np.arange(150), bootstrap_means(scores, resamples=400, seed=trial))
        inside += low <= 0.3 <= high
    assert 0.91 <= inside / 300 <= 0.98  # 95% give or take three standard errors of 300 trials


def test_interval_of_all_misses_has_width() -> None:
    # Clopper-Pearson for 0 of 200: 1 - 0.025 ** (1 / 200) = 0.01828; 200 queries of 100 videos are 100: 0.03622.
    zeros, ones, alone = np.zeros(200), np.ones(200), np.arange(200)
    assert score_interval(zeros, alone, bootstrap_means(zeros)) == (0, pytest.approx(0.01828, abs=1e-5))
    assert score_interval(ones, alone, bootstrap_means(ones)) == (pytest.approx(1 - 0.01828, abs=1e-5), 1)
    assert score_interval(zeros, alone // 2, bootstrap_means(zeros))[1] == pytest.approx(0.03622, abs=1e-5)


def test_p_values_and_holm_by_hand() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert p_value(np.full(999, 0.2)) == pytest.approx(2 / 1000)
    assert p_value(np.zeros(999)) == 1
    better = bootstrap_means(np.repeat([1.0, 0.0, -1.0], [60, 100, 40]), resamples=5000)
    # Mean 0.1, standard error sqrt((100/200 - 0.01) / 200) = 0.0495: z = 2.02, p = 0.043.
    assert p_value(better) == pytest.approx(0.043, abs=0.015)
    assert interval(better)[0] == pytest.approx(0.1 - 1.96 * 0.0495, abs=0.01)
