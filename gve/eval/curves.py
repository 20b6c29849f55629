"""Curves of a run as arrays: what it logged over its steps, and what an evaluation gave over its settings."""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gve.items import InputError

TENSORBOARD = "tensorboard"
"""Folder of a run folder that holds its event files."""


class Curve(NamedTuple):
    """Values over optimizer steps.

    Args:
        steps: [n] int64, rising.
        values: [n] float64, logged in float32.
    """

    steps: np.ndarray
    values: np.ndarray


class Band(NamedTuple):
    """A moving mean and the standard deviation around it.

    Args:
        steps: [n] int64.
        mean, deviation: [n] float64.
    """

    steps: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray


def read_scalars(run: str | Path, stage: str = "") -> dict[str, Curve]:
    """All scalars that a run logged to TensorBoard, tag -> curve.

    Steps that an interrupted attempt logged and that were taken again count once, as they ended.

    Args:
        run: a run folder, or one of event files.
        stage: "" for the fit, "validate" or "test" for an evaluation.

    Raises:
        InputError: there is nothing.
    """
    folder = Path(run) / TENSORBOARD if (Path(run) / TENSORBOARD).is_dir() else Path(run)
    folder = folder / stage
    if not any(folder.glob("events.*")):
        raise InputError(f"{folder} holds no event files: give the folder of a run of gve fit")
    with _quiet():
        events = EventAccumulator(str(folder), {"scalars": 0}).Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        points = events.Scalars(tag)
        found[tag] = Curve(np.array([p.step for p in points], np.int64), np.array([p.value for p in points]))
    if not found:
        raise InputError(f"the event files of {folder} hold no scalars")
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """The reader warns of every restart, which is nothing but a run that went on."""
    logger = logging.getLogger("tensorboard")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def moving_band(curve: Curve, window: int = 200) -> Band:
    """Mean and standard deviation of the last `window` steps at every point (the paper's plots of training: 200).

    At the begin of a run, where fewer steps exist, of those.

    Args:
        curve: logged every step, or every few.
        window: in optimizer steps.
    """
    if window < 1:
        raise InputError(f"a window of {window} steps holds nothing: use 1 or more")
    first = np.searchsorted(curve.steps, curve.steps - window, side="right")
    parts = [curve.values[begin : end + 1] for end, begin in enumerate(first)]
    return Band(curve.steps, np.array([part.mean() for part in parts]), np.array([part.std() for part in parts]))


class ScalingPoint(NamedTuple):
    """A line of scaling.csv: a set's or an ability's score under one setting.

    Args:
        setting: name, the folder of its results.
        frames, tokens: of a clip, of a frame.
        kind: "set" or "ability", averages among these.
        name: of the set or ability.
        value, low, high: score and its 95% interval over queries.
    """

    setting: str
    frames: int
    tokens: int
    kind: str
    name: str
    value: float
    low: float
    high: float


def read_scaling(path: str | Path) -> list[ScalingPoint]:
    """Test-time scaling as `gve uvrb run` with several --frames or --tokens wrote it.

    Args:
        path: scaling.csv, or the folder given by --out.

    Raises:
        InputError: it cannot be read, or is no such table.
    """
    file = Path(path) / "scaling.csv" if Path(path).is_dir() else Path(path)
    try:
        with open(file, newline="") as lines:
            rows = list(csv.DictReader(lines))
        return [
            ScalingPoint(
                row["setting"],
                int(row["frames"]),
                int(row["tokens"]),
                row["kind"],
                row["name"],
                *(float(row[key]) for key in ("value", "low", "high")),
            )
            for row in rows
        ]
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from None
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"{file} is no scaling.csv of gve uvrb run ({error!r})") from None
