"""The Modality Pyramid as pure functions: which tasks exist, on which level, and how often each is drawn in an epoch.

Source: GVE paper, section on Modality Pyramid Curriculum and its Figure 5; the places of I2T and T2TI are ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from gve.items import InputError

LEVELS: dict[int, tuple[str, ...]] = {
    1: ("T2T", "T2I", "I2T"),
    2: ("T2V", "I2V", "V2V", "I2I", "TI2I", "TI2T", "TI2TI", "T2TI"),
    3: ("TI2V", "TV2V"),
}
"""Pyramid level -> its modality tasks, bottom to top. Letters before the 2 are the query's modality."""

TASKS: dict[str, int] = {task: level for level, tasks in LEVELS.items() for task in tasks}
"""Modality task -> pyramid level."""


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

    Args:
        schedule: "pyramid": P proportional to exp(score / sigma), sigma rising over the epochs; "uniform": all units
            alike; "fixed": P proportional to `scores` as given, in every epoch.
        sigma_first: sigma of the first epoch (paper: 0.1).
        sigma_last: sigma of the last epoch (paper: 1.0).
        unit: what is drawn: "task" (default), "source" or "level". Inside a unit, sources are drawn by their sizes.
        size_exponent: P is multiplied by size ** size_exponent; 0 ignores sizes, 1 with "uniform" is proportional to
            them.
        floor: least probability of a unit, at most 1 / units.
        scores: unit -> mean cosine of its positive pairs before the first epoch ("pyramid"), or its weight ("fixed").
            Empty with "pyramid": all units start alike.
    """

    schedule: Literal["pyramid", "uniform", "fixed"] = "pyramid"
    sigma_first: float = 0.1
    sigma_last: float = 1.0
    unit: Literal["task", "source", "level"] = "task"
    size_exponent: float = 0.0
    floor: float = 0.0
    scores: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.schedule not in ("pyramid", "uniform", "fixed"):
            raise InputError(f"schedule {self.schedule!r}: use pyramid, uniform or fixed")
        if self.unit not in ("task", "source", "level"):
            raise InputError(f"unit {self.unit!r}: use task, source or level")
        if not (self.sigma_first > 0 and self.sigma_last > 0):
            raise InputError(f"sigma {self.sigma_first} to {self.sigma_last}: both must be above 0")
        if self.schedule == "fixed" and (not self.scores or min(self.scores.values()) < 0):
            raise InputError("schedule fixed needs `scores`: a weight of 0 or more for every unit")

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
        """
        if self.schedule == "fixed":
            scores = self.scores
        if scores and self.schedule != "uniform":
            missing = sorted(set(sizes) - set(scores))
            if missing:
                raise InputError(f"no score for {', '.join(missing)}: give one for every {self.unit}")
        if self.schedule == "uniform" or not scores:
            weights = dict.fromkeys(sizes, 1.0)
        elif self.schedule == "fixed":
            weights = {unit: scores[unit] for unit in sizes}
        else:
            weights = softmax(
                {unit: scores[unit] for unit in sizes}, sigma(epoch, num_epochs, self.sigma_first, self.sigma_last)
            )
        return normalise({unit: weights[unit] * sizes[unit] ** self.size_exponent for unit in sizes}, self.floor)


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
