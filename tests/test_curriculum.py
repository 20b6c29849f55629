"""The pyramid's formulas against hand calculations."""

from __future__ import annotations

import math

import pytest

from gve.data.curriculum import LEVELS, TASKS, Curriculum, level_of, sigma, softmax
from gve.items import InputError


def test_levels_are_those_of_the_paper() -> None:
    # Figure 5 bottom to top; I2T and T2TI placed by gve.md section 4.
    assert {level_of(task) for task in ("T2T", "T2I", "I2T")} == {1}
    assert {level_of(task) for task in ("T2V", "I2V", "V2V", "I2I", "TI2I", "TI2T", "TI2TI", "T2TI")} == {2}
    assert {level_of(task) for task in ("TI2V", "TV2V")} == {3}
    assert len(TASKS) == 13
    assert sum(map(len, LEVELS.values())) == 13
    with pytest.raises(InputError, match="V2X"):
        level_of("V2X")


def test_sigma_rises_linearly() -> None:
    # 3 epochs, 0.1 to 1.0: the middle one is 0.55.
    assert [sigma(epoch, 3) for epoch in range(3)] == pytest.approx([0.1, 0.55, 1.0], abs=1e-12)
    assert sigma(0, 1) == 0.1
    for epoch, epochs in ((3, 3), (-1, 3), (0, -1)):
        with pytest.raises(InputError, match="finite number of epochs"):
            sigma(epoch, epochs)


def test_probabilities_follow_the_formula() -> None:
    scores = {"T2V": 0.42, "T2T": 0.55, "TV2V": 0.31}
    sizes = {"T2T": 400, "T2V": 100, "TV2V": 25}
    curriculum = Curriculum()
    for epoch, width in ((0, 0.1), (1, 0.55), (2, 1.0)):
        found = curriculum.probabilities(epoch, 3, scores, sizes)
        total = sum(math.exp(value / width) for value in scores.values())
        assert found == pytest.approx({u: math.exp(scores[u] / width) / total for u in sizes}, abs=1e-9)
    # By hand, sigma 0.1: e^1.3 : e^2.4 over each other = weights 1, e^-1.3, e^-2.4 -> 0.7335, 0.1999, 0.0665.
    first = curriculum.probabilities(0, 3, scores, sizes)
    assert [round(first[u], 4) for u in ("T2T", "T2V", "TV2V")] == [0.7335, 0.1999, 0.0665]
    # Sharper early, flatter late.
    late = curriculum.probabilities(2, 3, scores, sizes)
    assert max(late.values()) / min(late.values()) < max(first.values()) / min(first.values())


def test_softmax_of_large_scores_does_not_overflow() -> None:
    assert softmax({"a": 1000.0, "b": 1000.0 - 0.1 * math.log(3)}, 0.1) == pytest.approx({"a": 0.75, "b": 0.25})


def test_size_exponent_and_floor() -> None:
    sizes = {"T2I": 300, "T2V": 100}
    proportional = Curriculum(schedule="uniform", size_exponent=1.0)
    assert proportional.probabilities(0, 1, {}, sizes) == {"T2I": 0.75, "T2V": 0.25}
    # floor 0.2 over two units: 0.2 + 0.6 * P.
    floored = Curriculum(schedule="fixed", scores={"T2I": 1.0, "T2V": 0.0}, floor=0.2)
    assert floored.probabilities(0, 1, {}, sizes) == pytest.approx({"T2I": 0.8, "T2V": 0.2}, abs=1e-12)
    with pytest.raises(InputError, match="floor"):
        Curriculum(floor=0.6).probabilities(0, 1, {}, sizes)


def test_schedules_without_measured_scores() -> None:
    sizes = {"T2I": 300, "T2V": 100}
    assert Curriculum().probabilities(0, 3, {}, sizes) == {"T2I": 0.5, "T2V": 0.5}
    # Uniform ignores scores; fixed ignores the prober's.
    assert Curriculum(schedule="uniform").probabilities(0, 3, {"T2I": 1.0}, sizes) == {"T2I": 0.5, "T2V": 0.5}
    fixed = Curriculum(schedule="fixed", scores={"T2I": 1.0, "T2V": 3.0})
    assert fixed.probabilities(2, 3, {"T2I": 0.9, "T2V": 0.1}, sizes) == {"T2I": 0.25, "T2V": 0.75}
    with pytest.raises(InputError, match="T2V"):
        Curriculum().probabilities(0, 3, {"T2I": 0.4}, sizes)


@pytest.mark.parametrize(
    "bad", [{"schedule": "random"}, {"unit": "row"}, {"sigma_first": 0.0}, {"schedule": "fixed"}, {"sigma_last": -1.0}]
)
def test_bad_settings_are_refused(bad: dict) -> None:
    with pytest.raises(InputError):
        Curriculum(**bad)
