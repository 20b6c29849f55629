"""The paper's 16 models: scores recomputed from its per-set table, what in it does not add up, and correlations.

The per-set values are the paper's Table 1, the abilities as printed its Table 2 (arXiv 2510.27571); both stand in
uvrb_published.csv. Everything here is computed from that file; the claims are the paper's own words on it.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import numpy as np

from gve.eval.statistics import correlation_interval, pearson
from gve.eval.uvrb import ABILITIES, ABILITY_PARTS, AVERAGES, SETS, ability_scores, published_scores

ROUNDING = 0.001
"""Printed values have three decimals; a mean of rounded values, rounded, is off by at most so much."""

MODEL_TYPES = {"all": ("clip", "mllm"), "CLIP-type": ("clip",), "MLLM-type": ("mllm",)}
"""Set of models -> families in it, as the paper groups them."""


@cache
def families() -> dict[str, str]:
    """Published model -> "clip" (dual encoder) or "mllm"."""
    text = resources.files("gve.eval").joinpath("uvrb_published.csv").read_text()
    return {row["model"]: row["family"] for row in csv.DictReader(text.splitlines())}


def models_of(kind: str) -> list[str]:
    """The published models of a set of models: "all" (16), "CLIP-type" (6) or "MLLM-type" (10)."""
    return [model for model, family in families().items() if family in MODEL_TYPES[kind]]


@cache
def recomputed_scores() -> dict[str, dict[str, float]]:
    """Model -> average or ability -> value that follows from its 16 printed set scores."""
    names = [record.name for record in SETS]
    return {
        model: ability_scores({name: printed[name] for name in names}) for model, printed in published_scores().items()
    }


@dataclass(frozen=True)
class Slip:
    """A printed value that does not follow from the values it is made of.

    Args:
        model: the published model.
        name: ability or average.
        printed, recomputed: the two values.
        explanation: what would mend it, where one change does.
    """

    model: str
    name: str
    printed: float
    recomputed: float
    explanation: str = ""

    def __str__(self) -> str:
        text = f"{self.model} {self.name}: printed {self.printed:.3f}, its sets give {self.recomputed:.3f}"
        return f"{text} ({self.explanation})" if self.explanation else text


@cache
def slips() -> tuple[Slip, ...]:
    """All cells of the printed ability table that are off by more than rounding."""
    found = []
    for model, recomputed in recomputed_scores().items():
        printed = published_scores()[model]
        wrong = [name for name in recomputed if _differs(printed[name], recomputed[name])]
        explanation = _misprinted_cell(printed, wrong)
        found += [Slip(model, name, printed[name], recomputed[name], explanation) for name in wrong]
    return tuple(found)


def _differs(printed: float, recomputed: float) -> bool:
    return abs(printed - recomputed) > ROUNDING + 1e-9


def _misprinted_cell(printed: Mapping[str, float], wrong: Sequence[str]) -> str:
    """Words for the one change of a set's score that explains every wrong cell of a model; "" if none does."""
    sets = {record.name for record in SETS}
    leaves = [name for name in wrong if name not in AVERAGES and set(ABILITY_PARTS[name]) <= sets]
    for leaf in leaves:
        parts = ABILITY_PARTS[leaf]
        shift = sum(printed[part] for part in parts) - len(parts) * printed[leaf]
        mended = ability_scores({name: printed[name] - (shift if name == parts[0] else 0.0) for name in sets})
        if not any(_differs(printed[name], value) for name, value in mended.items()):
            way = "low" if shift < 0 else "high"
            return f"all {len(wrong)} follow if one of {', '.join(parts)} is printed {abs(shift):.3f} too {way}"
    return ""


@dataclass(frozen=True)
class Quotation:
    """A score that the paper's text quotes for a model."""

    place: str
    model: str
    name: str
    value: float

    def __str__(self) -> str:
        own = published_scores()[self.model][self.name]
        owners = [model for model, row in published_scores().items() if row[self.name] == self.value]
        whose = f"; {self.value:.3f} is {' and '.join(owners)}" if owners else ""
        return f"{self.place} quotes {self.name} {self.value:.3f} for {self.model}: its row says {own:.3f}{whose}"


WRONG_QUOTATIONS = (Quotation("Finding 4", "Unite-7B", "VIS", 0.702),)


@dataclass(frozen=True)
class Correlation:
    """A Pearson correlation of two columns over a set of models.

    Args:
        models: a key of MODEL_TYPES.
        first, second: sets, abilities or averages. The paper's "AVG" is AVG-A.
        claimed: what the paper's text says; None where it says nothing.
        at_least: the claim is a lower bound.
    """

    models: str
    first: str
    second: str
    claimed: float | None = None
    at_least: bool = False

    @property
    def count(self) -> int:
        """Number of models."""
        return len(models_of(self.models))

    @property
    def value(self) -> float:
        """Recomputed from the sets' printed scores."""
        return pearson(*(_columns((name,), self.models)[:, 0] for name in (self.first, self.second)))

    @property
    def interval(self) -> tuple[float, float]:
        """95% by Fisher's z over the models."""
        return correlation_interval(self.value, self.count)

    @property
    def holds(self) -> bool | None:
        """Whether the claim agrees with the table to its two decimals; None without a claim."""
        if self.claimed is None:
            return None
        value = round(self.value, 2)
        return value >= self.claimed if self.at_least else abs(value - self.claimed) < 0.005

    def __str__(self) -> str:
        low, high = self.interval
        said = "" if self.claimed is None else f"claimed {'>= ' if self.at_least else ''}{self.claimed:.2f}, "
        return (
            f"correlation {self.first} - {self.second} over {self.count} models ({self.models}): {said}"
            f"the table gives {self.value:.2f} [{low:.2f}, {high:.2f}]"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "models": self.models,
            "n_models": self.count,
            "pair": [self.first, self.second],
            "claimed": self.claimed,
            "at_least": self.at_least,
            "value": self.value,
            "interval": list(self.interval),
            "holds": self.holds,
        }


CORRELATIONS = (
    Correlation("all", "PR", "AVG-A", 0.97),
    Correlation("all", "MSRVTT", "AVG-A", 0.58),
    Correlation("all", "VIS", "AVG-A", 0.26),
    Correlation("all", "S", "T", 0.12),
    Correlation("all", "T", "FG", 0.98),
    Correlation("all", "S", "FG", 0.39),
    Correlation("all", "FG", "PR", 0.90, at_least=True),
    Correlation("all", "FG", "LC", 0.90, at_least=True),
    Correlation("all", "PR", "LC", 0.90, at_least=True),
    Correlation("CLIP-type", "S", "CG", 0.99),
    Correlation("CLIP-type", "T", "CG", 0.46),
    Correlation("CLIP-type", "CMP", "VIS", -0.71),
    Correlation("CLIP-type", "T", "LC", -0.14),
    Correlation("CLIP-type", "MSRVTT", "AVG-A"),
    Correlation("MLLM-type", "PR", "CG", 0.98),
    Correlation("MLLM-type", "T", "LC", 0.64),
    Correlation("MLLM-type", "VIS", "AVG-A"),
)
"""What the paper's analysis says about its own table, and two values that its claims are best read beside."""


def _columns(names: Sequence[str], kind: str) -> np.ndarray:
    """[models, names] scores of a set of models: sets as printed, abilities recomputed."""
    table = {model: published_scores()[model] | recomputed_scores()[model] for model in models_of(kind)}
    return np.array([[row[name] for name in names] for row in table.values()])


def correlation_matrix(names: Sequence[str], kind: str) -> np.ndarray:
    """[names, names] Pearson correlations of columns over a set of models (the paper's Figures 7 and 8).

    A column that is part of another (PR of FG, all of AVG-A) correlates with it by construction.

    Args:
        names: sets, abilities or averages.
        kind: a key of MODEL_TYPES.
    """
    columns = _columns(names, kind)
    matrix = np.eye(len(names))
    for row, column in itertools.combinations(range(len(names)), 2):
        matrix[row, column] = matrix[column, row] = pearson(columns[:, row], columns[:, column])
    return matrix


def other_sizes(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Sets of a result whose counts are not the benchmark's: stand-ins of the same name (the toy world), or subsets.

    Published scores may stand beside a result only where this is empty. A count that the public sources are known to
    give in place of the published one (727 captions of CameraBench for 728) is the benchmark's.

    Args:
        rows: `sets` of a uvrb.json.
    """
    named = {record.name: record for record in SETS}
    found = []
    for name in rows.keys() & named.keys():
        record, row = named[name], rows[name]
        size = row["n_candidates"] if record.pooled else row["n_corpus"]
        pairs = ((row["n_query"], record.num_queries), (size, record.num_corpus))
        if any(own != published and own not in record.known_counts for own, published in pairs):
            found.append(name)
    return sorted(found, key=list(named).index)


def table_columns() -> tuple[str, ...]:
    """Averages, abilities and sets in the order of tables."""
    return (*AVERAGES, *ABILITIES, *(record.name for record in SETS))
