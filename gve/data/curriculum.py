"""The Modality Pyramid as pure functions: which tasks exist, on which level, and how often each is drawn in an epoch.

Source: GVE paper, section on Modality Pyramid Curriculum and its Figure 5; the places of I2T and T2TI are ours. The
schedules easy_first and hard_first are ours: controls that keep how much is drawn of every unit and change the order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from gve.items import InputError

LEVELS: dict[int, tuple[str, ...]] = {
    1: ("T2T", "T2I", "I2T"),
    2: ("T2V", "I2V", "V2V", "I2I", "TI2I", "TI2T", "TI2TI", "T2TI"),
    3: ("TI2V", "TV2V"),
}
"""Pyramid level -> its modality tasks, bottom to top. Letters before the 2 are the query's modality."""

TASKS: dict[str, int] = {task: level for level, tasks in LEVELS.items() for task in tasks}
"""Modality task -> pyramid level."""


Schedule = Literal["pyramid", "uniform", "fixed", "easy_first", "hard_first"]
Unit = Literal["task", "source", "level"]


def level_of(task: str) -> int:
    """The pyramid level of a modality task.

    Raises:
        InputError: the task is not one of the thirteen.
    """
    if task not in TASKS:
        raise InputError(f"unknown task {task!r}: use one of {', '.join(TASKS)}")
    return TASKS[task]


@dataclass(frozen=True)
class Curriculum:
    """How the share of each unit is chosen, epoch by epoch.

    The score R of a unit is the mean cosine of its positive pairs; a high one means easy. With K units of sizes n,
    prior_k = n_k ** size_exponent / sum over units (1 / K by default), epoch t of E:

    - pyramid: P_t(k) proportional to prior_k * exp(R_k / (sigma(t) * sigma_scale_k)), sigma linear over the epochs and
      R measured before each of them. With size_exponent 0 and no sigma_scale it is the paper's formula.
    - uniform: P_t(k) = prior_k.
    - fixed: P_t(k) proportional to prior_k * scores_k, the scores being weights.
    - easy_first: the units, sorted by falling R, are laid end to end on [0, 1], each as long as its prior; epoch t
      draws from [t / E, (t + 1) / E]: P_t(k) = E * length of what unit k has of that interval. hard_first: by rising
      R. Over the run each unit is drawn as often as under "uniform", so the two differ from it and from one another
      in order alone. The order is that of the scores before the first epoch.

    At last P_t(k) becomes floor + (1 - K * floor) * P_t(k).

    Args:
        schedule: "pyramid" (the paper's), "uniform", "fixed", "easy_first" or "hard_first".
        sigma_first: sigma of the first epoch (paper: 0.1).
        sigma_last: sigma of the last epoch (paper: 1.0).
        unit: what is drawn: "task" (default), "source" or "level". Inside a unit, sources are drawn by their sizes.
        size_exponent: of the prior; 0 ignores sizes, 1 with "uniform" is proportional to them.
        floor: least probability of a unit, at most 1 / units.
        scores: unit -> mean cosine of its positive pairs before the first epoch, or its weight ("fixed"). Empty with
            "pyramid": the probe gives them, and without a probe all units are alike.
        sigma_scale: unit -> factor on sigma for this unit ("pyramid"); 1 for units that are not named. It scales
            R / sigma around 0: where R is positive, a factor below 1 draws the unit more often, above 1 less.
    """

    schedule: Schedule = "pyramid"
    sigma_first: float = 0.1
    sigma_last: float = 1.0
    unit: Unit = "task"
    size_exponent: float = 0.0
    floor: float = 0.0
    scores: dict[str, float] = field(default_factory=dict)
    sigma_scale: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, allowed in (("schedule", Schedule), ("unit", Unit)):
            if getattr(self, name) not in get_args(allowed):
                raise InputError(f"{name} {getattr(self, name)!r}: use {', '.join(get_args(allowed))}")
        if not (self.sigma_first > 0 and self.sigma_last > 0):
            raise InputError(f"sigma {self.sigma_first} to {self.sigma_last}: both must be above 0")
        if self.sigma_scale and not min(self.sigma_scale.values()) > 0:
            raise InputError(f"sigma_scale {self.sigma_scale}: all factors must be above 0")
        if self.schedule == "fixed" and (not self.scores or min(self.scores.values()) < 0):
            raise InputError("schedule fixed needs `scores`: a weight of 0 or more for every unit")

    @property
    def needs_scores(self) -> bool:
        """Whether measured scores change what is drawn."""
        return self.schedule not in ("uniform", "fixed")

    @property
    def in_order(self) -> bool:
        """Whether the scores before the first epoch order the whole run, so that later ones are not to be taken."""
        return self.schedule in ("easy_first", "hard_first")

    def sigma_of(self, epoch: int, num_epochs: int) -> float:
        """Sharpness of the draw in an epoch, see `sigma`."""
        return sigma(epoch, num_epochs, self.sigma_first, self.sigma_last)

    def probabilities(
        self, epoch: int, num_epochs: int, scores: Mapping[str, float], sizes: Mapping[str, int]
    ) -> dict[str, float]:
        """The share of every unit in one epoch.

        Args:
            epoch: from 0.
            num_epochs: epochs of the whole run.
            scores: unit -> newest measured score; empty where nothing was measured yet.
            sizes: unit -> training rows; its keys are the units.

        Returns:
            unit -> probability, in the order of `sizes`; they sum to 1.

        Raises:
            InputError: a unit has no score, an unknown unit is named, or no unit can be drawn.
        """
        if unknown := sorted(set(self.sigma_scale) - set(sizes)):
            raise InputError(f"sigma_scale names {', '.join(unknown)}: the {self.unit}s are {', '.join(sizes)}")
        if self.schedule == "fixed":
            scores = self.scores
        if self.schedule != "uniform" and (scores or self.in_order):
            if missing := sorted(set(sizes) - set(scores)):
                raise InputError(f"no score for {', '.join(missing)}: give one for every {self.unit}")
            scores = {unit: scores[unit] for unit in sizes}
        prior = normalise({unit: size**self.size_exponent for unit, size in sizes.items()})
        if self.in_order:
            share = staged(scores, prior, epoch, num_epochs, hard_first=self.schedule == "hard_first")
        elif self.schedule == "uniform" or not scores:
            share = prior
        elif self.schedule == "fixed":
            share = {unit: scores[unit] * prior[unit] for unit in sizes}
        else:
            share = self._pyramid(scores, prior, self.sigma_of(epoch, num_epochs))
        return normalise(share, self.floor)

    def _pyramid(self, scores: Mapping[str, float], prior: Mapping[str, float], width: float) -> dict[str, float]:
        """Unit -> share, proportional to prior * exp(R / (sigma * scale))."""
        weights = softmax({unit: score / self.sigma_scale.get(unit, 1.0) for unit, score in scores.items()}, width)
        return {unit: weight * prior[unit] for unit, weight in weights.items()}


def sigma(epoch: int, num_epochs: int, first: float = 0.1, last: float = 1.0) -> float:
    """Sharpness of the draw: linear from `first` in epoch 0 to `last` in epoch num_epochs - 1.

    Raises:
        InputError: the epoch is outside the run.
    """
    if not 0 <= epoch < num_epochs:
        raise InputError(f"epoch {epoch} of {num_epochs}: the curriculum needs a finite number of epochs (max_epochs)")
    return first if num_epochs == 1 else first + (last - first) * epoch / (num_epochs - 1)


def softmax(scores: Mapping[str, float], sigma: float) -> dict[str, float]:
    """P(k) proportional to exp(R_k / sigma), computed without overflow."""
    top = max(scores.values())
    return normalise({unit: math.exp((score - top) / sigma) for unit, score in scores.items()})


def staged(
    scores: Mapping[str, float],
    prior: Mapping[str, float],
    epoch: int,
    num_epochs: int,
    *,
    hard_first: bool = False,
) -> dict[str, float]:
    """Units one after the other, easiest (highest score) first: P_t(k) = E * |k's interval in [t / E, (t + 1) / E]|.

    Units of equal score stand in the order of their names.

    Args:
        scores: unit -> score.
        prior: unit -> its share of the whole run; they sum to 1.
        epoch: t, from 0.
        num_epochs: E.
        hard_first: lowest score first.

    Raises:
        InputError: the epoch is outside the run.
    """
    if not 0 <= epoch < num_epochs:
        raise InputError(f"epoch {epoch} of {num_epochs}: the curriculum needs a finite number of epochs (max_epochs)")
    order = sorted(scores, key=lambda unit: (scores[unit] if hard_first else -scores[unit], unit))
    share, start = {}, 0.0
    for unit in order:
        end = start + prior[unit]
        inside = min(end, (epoch + 1) / num_epochs) - max(start, epoch / num_epochs)
        # An interval that only touches the epoch's may overlap it by a rounding error.
        share[unit] = num_epochs * inside if inside > 1e-12 else 0.0
        start = end
    return {unit: share[unit] for unit in scores}


def normalise(weights: Mapping[str, float], floor: float = 0.0) -> dict[str, float]:
    """Weights scaled to sum to 1, mixed with the uniform share so that none is below `floor`.

    Raises:
        InputError: no weight is above 0, or the floor leaves no room.
    """
    total = math.fsum(weights.values())
    if not total > 0:
        raise InputError("the weights sum to 0: at least one unit needs a weight above 0")
    if not 0 <= floor * len(weights) <= 1:
        raise InputError(f"floor {floor} for {len(weights)} units: use at most {1 / len(weights):.4f}")
    return {unit: floor + (1 - floor * len(weights)) * weight / total for unit, weight in weights.items()}
