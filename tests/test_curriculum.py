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
    "bad",
    [
        {"schedule": "random"},
        {"unit": "row"},
        {"sigma_first": 0.0},
        {"schedule": "fixed"},
        {"sigma_last": -1.0},
        {"sigma_scale": {"T2T": 0.0}},
    ],
)
def test_bad_settings_are_refused(bad: dict) -> None:
    with pytest.raises(InputError):
        Curriculum(**bad)


def test_sigma_of_one_unit() -> None:
    # T2V at 0.42 / (0.1 * 2) = 2.1 against T2T at 0.55 / 0.1 = 5.5 and TV2V at 0.31 / (0.1 * 0.5) = 6.2, by hand:
    # e^-0.7 = 0.496585 and e^-4.1 = 0.016573 beside 1, sum 1.513158.
    curriculum = Curriculum(sigma_scale={"T2V": 2.0, "TV2V": 0.5})
    found = curriculum.probabilities(0, 3, {"T2V": 0.42, "T2T": 0.55, "TV2V": 0.31}, {"T2T": 4, "T2V": 1, "TV2V": 2})
    assert found == pytest.approx({"T2T": 0.328178, "T2V": 0.010952, "TV2V": 0.660870}, abs=1e-6)
    with pytest.raises(InputError, match="sigma_scale names T2X"):
        Curriculum(sigma_scale={"T2X": 2.0}).probabilities(0, 3, {}, {"T2T": 4})


SCORES = {"clips": 0.3, "texts": 0.6, "stills": 0.45, "edits": 0.1}
SIZES = {"clips": 800, "texts": 100, "stills": 100, "edits": 200}


def test_easy_first_and_hard_first_lay_the_units_end_to_end() -> None:
    # Four units of a quarter each over three epochs: an epoch takes a unit and a third of the next, and so on.
    easy, hard = Curriculum("easy_first"), Curriculum("hard_first")
    expected = [
        {"texts": 3 / 4, "stills": 1 / 4},
        {"stills": 1 / 2, "clips": 1 / 2},
        {"clips": 1 / 4, "edits": 3 / 4},
    ]
    for epoch, shares in enumerate(expected):
        nothing = dict.fromkeys(SIZES, 0.0)
        assert easy.probabilities(epoch, 3, SCORES, SIZES) == pytest.approx({**nothing, **shares}, abs=1e-12)
        # Another order of the same units: hard_first is easy_first read backwards.
        assert hard.probabilities(2 - epoch, 3, SCORES, SIZES) == pytest.approx({**nothing, **shares}, abs=1e-12)
    # Equal scores stand by name, and one epoch has room for all.
    assert easy.probabilities(0, 2, {"b": 0.5, "a": 0.5}, {"b": 1, "a": 1}) == {"b": 0.0, "a": 1.0}
    assert easy.probabilities(0, 1, SCORES, SIZES) == pytest.approx(dict.fromkeys(SIZES, 0.25), abs=1e-12)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("epochs", [1, 2, 3, 5])
def test_the_controls_draw_as_much_of_every_unit_as_uniform(exponent: float, epochs: int) -> None:
    """What reviewers asked for: another order, and nothing else; also with a size prior."""
    uniform = Curriculum("uniform", size_exponent=exponent).probabilities(0, epochs, {}, SIZES)
    for schedule in ("easy_first", "hard_first"):
        curriculum = Curriculum(schedule, size_exponent=exponent)
        each = [curriculum.probabilities(epoch, epochs, SCORES, SIZES) for epoch in range(epochs)]
        assert all(math.fsum(shares.values()) == pytest.approx(1, abs=1e-12) for shares in each)
        for unit in SIZES:
            assert math.fsum(shares[unit] for shares in each) / epochs == pytest.approx(uniform[unit], abs=1e-12)
        # The mean score that is drawn falls (easy first) or rises, epoch by epoch.
        means = [sum(SCORES[unit] * share for unit, share in shares.items()) for shares in each]
        assert means == sorted(means, reverse=schedule == "easy_first")
    assert Curriculum("easy_first", floor=0.05).probabilities(0, 3, SCORES, SIZES)["edits"] == pytest.approx(0.05)


def test_an_order_needs_scores() -> None:
    with pytest.raises(InputError, match="no score for clips"):
        Curriculum("easy_first").probabilities(0, 3, {}, SIZES)
    with pytest.raises(InputError, match="finite number of epochs"):
        Curriculum("hard_first").probabilities(3, 3, SCORES, SIZES)
    assert [Curriculum(schedule).in_order for schedule in ("pyramid", "uniform", "easy_first", "hard_first")] == [
        *(False, False, True, True)
    ]
