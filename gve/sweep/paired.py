"""What paired seeds say of two arms: difference, interval, p, and the least effect that so many seeds can detect.

The pair is the seed: both arms start from the same weights and are scored on the same queries, so the noise of a
difference is smaller than that of either score. The interval is over seeds: what another seed would give. An interval
over queries (`gve uvrb compare`) answers another question and does not replace it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from gve.eval.statistics import CONFIDENCE, holm
from gve.items import InputError
from gve.sweep.collect import Row

POWER = 0.8


def t_quantile(share: float, freedom: int) -> float:
    """Quantile of Student's t distribution."""
    return float(stats.t.ppf(share, freedom))


@dataclass(frozen=True)
class Effect:
    """Mean of paired differences over n seeds.

    Args:
        value: the mean.
        interval: 95%, by Student's t with n - 1 degrees of freedom.
        p: two-sided, of "no difference".
        deviation: standard deviation of the differences.
        detectable: least true difference that a test at 5% of so many seeds with this deviation finds in 80% of the
            cases: (t_0.975 + t_0.8) deviation / sqrt(n). A smaller effect may exist and stay unseen.
        n: seeds.
    """

    value: float
    interval: tuple[float, float]
    p: float
    deviation: float
    detectable: float
    n: int


def paired_effect(differences: Sequence[float]) -> Effect:
    """The effect behind paired differences.

    Raises:
        InputError: fewer than two.
    """
    n = len(differences)
    if n < 2:
        raise InputError(f"{n} paired seeds carry no interval; at least 2 do")
    values = np.asarray(differences, np.float64)
    mean, deviation = float(values.mean()), float(values.std(ddof=1))
    error, freedom = deviation / math.sqrt(n), n - 1
    reach = t_quantile((1 + CONFIDENCE) / 2, freedom)
    # Equal differences of all seeds leave no noise to compare with.
    p = 2 * float(stats.t.sf(abs(mean) / error, freedom)) if error > 0 else float(mean == 0)
    return Effect(
        value=mean,
        interval=(mean - reach * error, mean + reach * error),
        p=p,
        deviation=deviation,
        detectable=(reach + t_quantile(POWER, freedom)) * error,
        n=n,
    )


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of seeds and its 95% interval by Student's t; nan bounds for one seed."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, math.nan, math.nan
    reach = t_quantile((1 + CONFIDENCE) / 2, len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean, mean - reach, mean + reach


def scores_of(rows: Sequence[Row], metric: str, setting: str = "") -> dict[str, dict[int, float]]:
    """Cell -> seed -> score, of the rows that are done and have the score.

    Raises:
        InputError: rows of one comparison were scored under different protocols.
    """
    found: dict[str, dict[int, float]] = {}
    protocols: dict[str, str] = {}
    for row in rows:
        if row.done and row.facts["setting"] == setting and metric in row.scores:
            found.setdefault(row.cell, {})[row.seed] = row.scores[metric]
            protocols.setdefault(row.facts["protocol"], row.facts["run"])
    if len(protocols) > 1:
        raise InputError(f"these runs were scored under different protocols: {', '.join(protocols.values())}")
    return found


def compare(scores: Mapping[str, Mapping[int, float]], one: str, other: str) -> Effect:
    """Arm `one` minus arm `other`, over the seeds that both have.

    Raises:
        InputError: an arm is missing, or fewer than two seeds are shared.
    """
    for name in (one, other):
        if name not in scores:
            raise InputError(f"no done run of {name}")
    shared = sorted(set(scores[one]) & set(scores[other]))
    return paired_effect([scores[one][seed] - scores[other][seed] for seed in shared])


def adjusted(effects: Mapping[str, Effect]) -> dict[str, float]:
    """Holm-adjusted p-values of a family of comparisons."""
    return holm({name: effect.p for name, effect in effects.items()})
