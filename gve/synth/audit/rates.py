"""The rate of false claims with its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from gve.eval.statistics import CONFIDENCE


@dataclass(frozen=True)
class Rate:
    """Share of false claims.

    Args:
        false, decided: claims that are false, and that are true or false.
        untold: claims that the judge could not decide; part of neither.
        videos: clusters of the decided ones.
        value: false / decided; None where none was decided.
        low, high: 95% interval; None where there is no value.
    """

    false: int
    decided: int
    untold: int
    videos: int
    value: float | None
    low: float | None
    high: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def rate(false: Sequence[bool], videos: Sequence[str], untold: int = 0) -> Rate:
    """The rate of one group of claims.

    The interval is Wilson's at the effective number of claims: their number divided by the design effect, which is the
    variance of the rate with whole videos as clusters (linearised ratio) over that of independent claims, and never
    counted below 1; with Student's quantile for the number of videos. Where each video has one claim it is the plain
    Wilson interval. A percentile bootstrap over videos was tried first: with 10 to 40 videos and 10 claims of each it
    held the true rate in 89 to 93% of simulated draws, this one in 93 to 97% (tests/test_synth_audit.py).

    Args:
        false: of each decided claim, whether it is false.
        videos: of each decided claim, its video.
        untold: claims that could not be decided.
    """
    count = len(false)
    if not count:
        return Rate(0, 0, untold, 0, None, None, None)
    _, cluster = np.unique(np.asarray(videos), return_inverse=True)
    wrong, sizes = np.bincount(cluster, np.asarray(false, float)), np.bincount(cluster).astype(float)
    clusters, share = len(sizes), float(wrong.sum() / count)
    low, high = wilson(share, *_effective(wrong, sizes, share))
    return Rate(int(wrong.sum()), count, untold, clusters, share, low, high)


def _effective(wrong: np.ndarray, sizes: np.ndarray, share: float) -> tuple[float, float]:
    """Effective number of claims, and the quantile that goes with it.

    Args:
        wrong, sizes: [clusters] false claims and claims.
        share: of all.
    """
    clusters, count = len(sizes), float(sizes.sum())
    normal = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    if sizes.max() == 1:
        return count, normal
    if clusters == 1:
        return 1.0, normal  # one video says nothing about how videos differ
    if share in (0.0, 1.0):  # no variance to be seen: as if a video's claims were one
        return float(clusters), student(normal, clusters - 1)
    variance = clusters / (clusters - 1) * float(((wrong - share * sizes) ** 2).sum()) / count**2
    effect = max(1.0, variance * count / (share * (1 - share)))
    return count / effect, student(normal, clusters - 1)


def student(normal: float, freedom: int) -> float:
    """Quantile of Student's t from the normal one (Cornish and Fisher's expansion; Abramowitz and Stegun 26.7.5).

    Right to 1% from 4 degrees of freedom on.
    """
    x, v = normal, freedom
    terms = (
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160,
    )
    return x + sum(term / v**power for power, term in enumerate(terms, 1))


def wilson(share: float, count: float, quantile: float) -> tuple[float, float]:
    """Wilson's score interval of a share.

    Args:
        count: of trials; effective numbers need not be whole.
        quantile: of the confidence, 1.96 for 95%.
    """
    square = quantile**2 / count
    middle = (share + square / 2) / (1 + square)
    reach = quantile * math.sqrt(share * (1 - share) / count + square / (4 * count)) / (1 + square)
    return max(0.0, middle - reach), min(1.0, middle + reach)
