"""Intervals, p-values and correlations: against exact values, slow obvious versions, and how often intervals cover."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest

from gve.eval.statistics import (
    bootstrap_means,
    correlation_interval,
    difference_interval,
    holm,
    interval,
    joint_bootstrap_means,
    p_value,
    pearson,
    score_interval,
)

COVERED = (0.93, 0.97)


@pytest.mark.parametrize(("queries", "rate"), [(100, 0.3), (100, 0.5), (400, 0.1), (400, 0.85), (1000, 0.5)])
def test_interval_of_independent_queries_covers(queries: int, rate: float) -> None:
    """Exact, not simulated: the interval depends on the number of hits alone, whose distribution is binomial."""
    spread = 4 * (queries * rate * (1 - rate)) ** 0.5
    covered = total = 0.0
    for hits in range(int(queries * rate - spread), min(queries, int(queries * rate + spread)) + 1):
        scores = np.arange(queries) < hits
        clusters = np.arange(queries)
        low, high = score_interval(scores, clusters, bootstrap_means(scores.astype(float), clusters, resamples=4000))
        probability = comb(queries, hits) * rate**hits * (1 - rate) ** (queries - hits)
        total += probability
        covered += probability * (low <= rate <= high)
    assert total > 0.999
    assert COVERED[0] <= covered <= COVERED[1]


def correlated_hits(rng: np.random.Generator, videos: int, queries: int, rate: float, within: float) -> np.ndarray:
    """[videos, queries] hits; those of one video have correlation `within`, as its own rate is beta distributed."""
    strength = (1 - within) / within
    return (rng.random((videos, queries)) < rng.beta(rate * strength, (1 - rate) * strength, (videos, 1))) * 1.0


def coverage(draws: int, *, videos: int, queries: int, rate: float, within: float, clustered: bool) -> float:
    rng = np.random.default_rng(1)
    clusters = np.repeat(np.arange(videos), queries)
    covered = 0
    for draw in range(draws):
        scores = correlated_hits(rng, videos, queries, rate, within).ravel()
        means = bootstrap_means(scores, clusters if clustered else None, resamples=1000, seed=draw)
        low, high = score_interval(scores, clusters, means)
        covered += low <= rate <= high
    return covered / draws


def test_interval_of_queries_that_share_videos_covers() -> None:
    assert COVERED[0] <= coverage(1200, videos=200, queries=6, rate=0.4, within=0.3, clustered=True) <= COVERED[1]


def test_an_interval_that_ignores_videos_does_not_cover() -> None:
    """Negative control of the test above: six queries of a video are not six observations."""
    assert coverage(300, videos=200, queries=6, rate=0.4, within=0.3, clustered=False) < 0.85


@pytest.mark.slow
@pytest.mark.parametrize(("videos", "queries", "rate"), [(100, 1, 0.7), (300, 3, 0.15), (1000, 6, 0.3), (467, 1, 0.45)])
def test_intervals_cover_at_the_sizes_of_the_benchmark(videos: int, queries: int, rate: float) -> None:
    assert COVERED[0] <= coverage(4000, videos=videos, queries=queries, rate=rate, within=0.3, clustered=True) <= 0.97


def shared_draw(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Three sets of one query to each of 300 videos, as CRB-G/S/T: a video that is hard is hard in all of them."""
    hits = correlated_hits(rng, 300, 3, 0.5, 0.5)
    return {name: hits[:, place] for place, name in enumerate("GST")}


@pytest.mark.parametrize("joint", [True, False])
def test_mean_of_sets_that_share_videos_covers_only_when_drawn_together(joint: bool) -> None:
    rng = np.random.default_rng(2)
    clusters = {name: np.arange(300) for name in "GST"}
    covered = 0
    for draw in range(1200):
        sets = shared_draw(rng)
        if joint:
            replicates = joint_bootstrap_means(sets, clusters, resamples=600, seed=draw)
        else:
            replicates = {
                n: bootstrap_means(own, clusters[n], resamples=600, seed=draw, name=n) for n, own in sets.items()
            }
        low, high = interval(np.mean(list(replicates.values()), axis=0))
        covered += low <= 0.5 <= high
    assert (COVERED[0] <= covered / 1200 <= COVERED[1]) == joint


def test_joint_bootstrap_equals_drawing_videos_one_by_one() -> None:
    """Means, spreads and the correlation of two sets that share some of their videos."""
    rng = np.random.default_rng(3)
    clusters = {"a": np.repeat(np.arange(20), 2), "b": np.arange(10, 40)}
    scores = {"a": rng.random(40), "b": rng.random(30) + 0.3 * np.isin(clusters["b"], np.arange(20))}
    scores["b"][:10] += scores["a"][20::2]
    got = joint_bootstrap_means(scores, clusters, resamples=20000)
    drawn = np.stack([np.bincount(rng.integers(0, 40, 40), minlength=40) for _ in range(10000)])
    weights = {name: drawn[:, clusters[name]] for name in "ab"}
    slow = np.stack([weights[name] @ scores[name] / weights[name].sum(axis=1) for name in "ab"], axis=1)
    for place, name in enumerate("ab"):
        assert got[name].mean() == pytest.approx(slow[:, place].mean(), abs=0.004)
        assert got[name].std() == pytest.approx(slow[:, place].std(), rel=0.05)
    together = np.corrcoef(got["a"], got["b"])[0, 1]
    assert together == pytest.approx(np.corrcoef(slow.T)[0, 1], abs=0.05)
    assert together > 0.2


def test_a_set_that_shares_nothing_keeps_its_replicates() -> None:
    rng = np.random.default_rng(4)
    scores = {name: (rng.random(50) < 0.5) * 1.0 for name in "abc"}
    clusters = {"a": np.arange(50), "b": np.arange(100, 150), "c": np.arange(25, 75)}
    got = joint_bootstrap_means(scores, clusters, resamples=500)
    assert list(got) == ["a", "b", "c"]
    np.testing.assert_array_equal(got["b"], bootstrap_means(scores["b"], clusters["b"], resamples=500, name="b"))
    assert not np.array_equal(got["a"], bootstrap_means(scores["a"], clusters["a"], resamples=500, name="a"))


def test_exact_bounds_where_all_replicates_are_equal() -> None:
    """Clopper-Pearson by hand: 0.025 ** (1 / 12) = 0.7354."""
    clusters = np.arange(12)
    assert score_interval(np.ones(12), clusters, np.ones(9)) == (pytest.approx(0.73535, abs=1e-5), 1.0)
    assert score_interval(np.zeros(12), clusters, np.zeros(9)) == (0.0, pytest.approx(0.26465, abs=1e-5))
    low, high = difference_interval(np.zeros(12), clusters, np.zeros(9))
    assert (low, high) == (pytest.approx(-0.26465, abs=1e-5), pytest.approx(0.26465, abs=1e-5))
    two_each = np.repeat(np.arange(6), 2)  # six videos, not twelve: 1 - 0.025 ** (1 / 6) = 0.4593
    assert difference_interval(np.zeros(12), two_each, np.zeros(9))[1] == pytest.approx(0.45926, abs=1e-5)


def test_paired_difference_covers() -> None:
    """Two models that mostly agree: hits of the second are those of the first with 12% lost and 6% won."""
    rng = np.random.default_rng(5)
    covered = 0
    for draw in range(1500):
        first = rng.random(400) < 0.5
        second = np.where(first, rng.random(400) >= 0.12, rng.random(400) < 0.06)
        differences = second * 1.0 - first
        means = bootstrap_means(differences, resamples=1000, seed=draw)
        low, high = difference_interval(differences, np.arange(400), means)
        covered += low <= -0.03 <= high
    assert COVERED[0] <= covered / 1500 <= COVERED[1]


def test_p_value_and_holm_by_hand() -> None:
    replicates = np.concatenate([np.full(990, 0.1), np.full(9, -0.1)])
    assert p_value(replicates) == pytest.approx(2 * 10 / 1000)
    assert p_value(np.zeros(999)) == 1.0
    # Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1, each at least the one before: 0.04, 0.06, 0.06, 0.06.
    adjusted = holm({"a": 0.04, "b": 0.01, "c": 0.03, "d": 0.02})
    assert {name: adjusted[name] for name in "abcd"} == pytest.approx({"a": 0.06, "b": 0.04, "c": 0.06, "d": 0.06})
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}


def test_holm_keeps_the_family_wise_error() -> None:
    """Sixteen equal models: at least one of sixteen true nulls is rejected in at most 5%; unadjusted in most draws."""
    p = np.random.default_rng(6).random((2000, 16))
    adjusted = np.array([min(holm(dict(enumerate(map(float, row)))).values()) for row in p])  # type: ignore[arg-type]
    assert (adjusted < 0.05).mean() < 0.065
    assert (p.min(axis=1) < 0.05).mean() > 0.5


def test_pearson_is_numpys() -> None:
    rng = np.random.default_rng(7)
    a, b = rng.random(9), rng.random(9)
    assert pearson(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-12)
    assert np.isnan(pearson(a, np.ones(9)))


@pytest.mark.parametrize("count", [6, 10, 16])
@pytest.mark.parametrize("rho", [0.0, 0.6, 0.95])
def test_correlation_interval_covers(count: int, rho: float) -> None:
    """Normal pairs, as many as the paper has models; the interval from the formula and from the function agree."""
    rng = np.random.default_rng(8)
    pairs = rng.normal(size=(6000, count, 2))
    pairs[..., 1] = rho * pairs[..., 0] + (1 - rho**2) ** 0.5 * pairs[..., 1]
    pairs -= pairs.mean(axis=1, keepdims=True)
    products = np.einsum("dni,dnj->dij", pairs, pairs)
    r = products[:, 0, 1] / np.sqrt(products[:, 0, 0] * products[:, 1, 1])
    bounds = np.array([correlation_interval(float(value), count) for value in r])
    assert COVERED[0] <= ((bounds[:, 0] <= rho) & (rho <= bounds[:, 1])).mean() <= COVERED[1]
    assert bounds[0, 1] == pytest.approx(np.tanh(np.arctanh(r[0]) + 1.959964 / (count - 3) ** 0.5), abs=1e-6)


def test_a_bootstrap_over_six_models_would_be_too_narrow() -> None:
    """Why the interval of a correlation is Fisher's: percentile bootstraps of six pairs cover too rarely."""
    rng = np.random.default_rng(9)
    covered = 0
    for _ in range(600):
        first = rng.normal(size=6)
        second = 0.9 * first + 0.19**0.5 * rng.normal(size=6)
        rows = rng.integers(0, 6, (400, 6))
        a, b = first[rows], second[rows]
        a, b = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
        with np.errstate(invalid="ignore"):
            low, high = interval(np.nan_to_num((a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1)), nan=1.0))
        covered += low <= 0.9 <= high
    assert covered / 600 < 0.93


def test_too_few_pairs_have_no_interval() -> None:
    with pytest.raises(ValueError, match="3 pairs"):
        correlation_interval(0.5, 3)
