"""Data scaling: y = a ln x + b by least squares, with intervals (paper, data scaling over 1e5, 1e6 and 1e7 pairs)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gve.items import InputError
from gve.sweep.paired import CONFIDENCE, t_quantile

Interval = tuple[float, float]


@dataclass(frozen=True)
class LogFit:
    """y = a ln x + b.

    Args:
        a: slope.
        b: value at x = 1.
        a_interval, b_interval: 95% intervals by Student's t with n - 2 degrees of freedom; nan with two points.
        r2: share of the variance of y that the line explains; nan where y is constant.
        n: points.
    """

    a: float
    b: float
    a_interval: Interval
    b_interval: Interval
    r2: float
    n: int

    @property
    def per_tenfold(self) -> float:
        """What ten times x adds to y: a ln 10."""
        return self.a * math.log(10)

    @property
    def per_tenfold_interval(self) -> Interval:
        """Its 95% interval."""
        low, high = self.a_interval
        return low * math.log(10), high * math.log(10)

    def at(self, x: float) -> float:
        """The line's y at x."""
        return self.a * math.log(x) + self.b


def log_fit(x: Sequence[float], y: Sequence[float]) -> LogFit:
    """Fits y = a ln x + b.

    The intervals take the scatter of the points around the line as their noise: with one run at each x they are
    intervals of the line through these runs, and with few points wide.

    Args:
        x: [n] above 0, at least two different ones; runs of several seeds stand as points of their own.
        y: [n].

    Raises:
        InputError: too few points, or an x that has no logarithm.
    """
    if len(x) != len(y) or len(set(x)) < 2 or min(x) <= 0:
        raise InputError(f"a fit of y = a ln x + b needs two different x above 0 and as many y: {len(x)} x, {len(y)} y")
    logs, values = np.log(np.asarray(x, np.float64)), np.asarray(y, np.float64)
    n, centre = len(logs), logs.mean()
    spread = float(((logs - centre) ** 2).sum())
    a = float(((logs - centre) * (values - values.mean())).sum()) / spread
    b = float(values.mean()) - a * float(centre)
    residual = float(((values - a * logs - b) ** 2).sum())
    total = float(((values - values.mean()) ** 2).sum())
    if n > 2:
        variance, reach = residual / (n - 2), t_quantile((1 + CONFIDENCE) / 2, n - 2)
        a_reach = reach * math.sqrt(variance / spread)
        b_reach = reach * math.sqrt(variance * (1 / n + float(centre) ** 2 / spread))
    else:
        a_reach = b_reach = math.nan
    return LogFit(
        a=a,
        b=b,
        a_interval=(a - a_reach, a + a_reach),
        b_interval=(b - b_reach, b + b_reach),
        r2=1 - residual / total if total > 0 else math.nan,
        n=n,
    )
