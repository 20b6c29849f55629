"""The draw of every epoch from scores and sizes, and a logged curriculum drawn again under other settings."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gve.data.curriculum import Curriculum
from gve.data.plan import PlannedSource, units_of
from gve.items import InputError

Scores = dict[int, dict[str, float]]
"""Epoch -> unit -> probe score; an epoch without scores takes the newest before it."""


@dataclass(frozen=True)
class Epoch:
    """The draw of one epoch: sharpness (None unless it enters), scores (empty: none known), share of each unit."""

    epoch: int
    sigma: float | None
    scores: dict[str, float]
    probabilities: dict[str, float]


@dataclass(frozen=True)
class History:
    """A logged curriculum: `curriculum.json` of a run folder.

    Args:
        unit: of the scores and shares: "task", "source" or "level".
        sizes: unit -> training rows; empty where the file does not say.
        scores, probabilities, draws: epoch -> unit -> score, share, drawn steps.
    """

    unit: str
    sizes: dict[str, int]
    scores: Scores
    probabilities: dict[int, dict[str, float]]
    draws: dict[int, dict[str, int]]

    @classmethod
    def load(cls, path: Path) -> History:
        """Reads the file, or that of a run folder.

        Raises:
            InputError: it is missing or no such file.
        """
        path = path / "curriculum.json" if path.is_dir() else path
        values = _read_json(path)
        try:
            epochs = {int(entry["epoch"]): entry for entry in values["epochs"]}
            if not epochs:
                raise InputError(f"{path} holds no epoch yet")
            return cls(
                unit=values["unit"],
                sizes=dict(values.get("sizes") or {}),
                scores={e: {k: float(v) for k, v in entry["scores"].items()} for e, entry in epochs.items()},
                probabilities={e: {k: float(v) for k, v in x["probabilities"].items()} for e, x in epochs.items()},
                draws={e: dict(entry.get("draws") or {}) for e, entry in epochs.items()},
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is no curriculum.json of a run ({error!r})") from error


def convert_scores(
    scores: Mapping[str, float], old: str, new: str, sources: Sequence[PlannedSource]
) -> dict[str, float]:
    """Scores of one unit ("task", "source" or "level") as scores of another.

    Every source takes the score of the old unit it is in; a new unit takes the mean over its sources, weighted by their
    rows. Exact where the new unit is coarser and pairs were probed by size; from coarse to fine all members are alike.

    Raises:
        InputError: a unit of these sources has no score.
    """
    if missing := sorted(set(units_of(sources, old)) - set(scores)):
        raise InputError(f"no score for {old} {', '.join(missing)}: the scores are for {', '.join(sorted(scores))}")
    own = {k: scores[unit] for unit, members in units_of(sources, old).items() for k in members}
    found = {}
    for unit, members in sorted(units_of(sources, new).items()):
        rows = [sources[k].size for k in members]
        found[unit] = math.fsum(own[k] * size for k, size in zip(members, rows, strict=True)) / sum(rows)
    return found


def sizes_of(sources: Sequence[PlannedSource], unit: str) -> dict[str, int]:
    """Unit -> training rows."""
    return {name: sum(sources[k].size for k in members) for name, members in sorted(units_of(sources, unit).items())}


def draw_epochs(curriculum: Curriculum, sizes: Mapping[str, int], num_epochs: int, scores: Scores) -> list[Epoch]:
    """The draw of every epoch, as the DataModule makes it.

    An epoch takes the newest scores that are known before it; an order (easy_first, hard_first) takes the first ones
    for the whole run; where there are none, those of the configuration.
    """
    epochs = []
    for epoch in range(num_epochs):
        known = [e for e in scores if e <= epoch]
        used = scores[min(known) if curriculum.in_order else max(known)] if known else curriculum.scores
        rounded = {unit: round(score, 6) for unit, score in used.items()}
        shares = curriculum.probabilities(epoch, num_epochs, rounded, sizes)
        width = curriculum.sigma_of(epoch, num_epochs) if curriculum.schedule == "pyramid" else None
        epochs.append(Epoch(epoch, width, rounded, {unit: round(share, 9) for unit, share in shares.items()}))
    return epochs


def replayed_scores(
    history: History | None, prober: tuple[str, dict[str, float]] | None, unit: str, sources: Sequence[PlannedSource]
) -> Scores:
    """Scores of each epoch for a unit: as logged, those before the first epoch by another prober where one is given.

    A prober scores epoch 0 only: from then on the run's own weights did, and what they would have scored after another
    first epoch cannot be known.
    """
    scores = dict(history.scores) if history else {}
    units = dict.fromkeys(scores, history.unit if history else unit)
    if prober is not None:
        units[0], scores[0] = prober[0] or unit, prober[1]
    return {
        epoch: each if units[epoch] == unit else convert_scores(each, units[epoch], unit, sources)
        for epoch, each in scores.items()
        if each
    }


def compare(history: History, epochs: Sequence[Epoch], unit: str) -> dict[str, Any]:
    """The logged draw beside the planned one, in JSON-able form.

    Returns:
        unit, logged_unit; epochs: epoch, logged and planned (unit -> share) and distance, half the sum of the absolute
        differences (None where the units differ, or the epoch was not logged).
    """
    rows: list[dict[str, Any]] = []
    for epoch in epochs:
        logged = history.probabilities.get(epoch.epoch, {})
        same = history.unit == unit and set(logged) == set(epoch.probabilities)
        distance = (
            math.fsum(abs(logged[name] - share) for name, share in epoch.probabilities.items()) / 2 if same else None
        )
        rows.append({"epoch": epoch.epoch, "logged": logged, "planned": epoch.probabilities, "distance": distance})
    return {"unit": unit, "logged_unit": history.unit, "epochs": rows}


def expected_steps(epoch: Epoch, sources: Sequence[PlannedSource], unit: str, steps: int) -> dict[str, float]:
    """Source -> expected steps of it in an epoch of so many steps."""
    found = {}
    for name, members in units_of(sources, unit).items():
        size = sum(sources[k].size for k in members)
        for k in members:
            found[sources[k].name] = steps * epoch.probabilities[name] * sources[k].size / size
    return found


def read_prober(path: Path) -> tuple[str, dict[str, float]]:
    """Scores of a prober: (unit, or "" where the file does not say; unit -> score).

    The file holds {unit: score}, {"unit": ..., "scores": {...}}, or is the curriculum.json of a run, whose first epoch
    was scored by its prober.

    Raises:
        InputError: it is none of them.
    """
    values = _read_json(path)
    if isinstance(values, dict) and "epochs" in values:
        history = History.load(path)
        return history.unit, history.scores[min(history.scores)]
    unit, scores = "", values
    if isinstance(values, dict) and "scores" in values:
        unit, scores = values.get("unit", ""), values["scores"]
    if not isinstance(scores, dict) or not all(isinstance(value, (int, float)) for value in scores.values()):
        raise InputError(f"{path} holds no scores: give {{unit: score}}, or the curriculum.json of a run")
    return unit, {name: float(value) for name, value in scores.items()}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise InputError(f"{path} is no JSON ({error})") from None
