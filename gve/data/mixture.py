"""The training mixture of GVE as data: the 38 rows of the paper's tables, in `mixture.csv` beside this file.

Sizes, hard negatives and batch sizes are the published ones. The instructions are the project's own (the paper trains
every source with one and prints none); so are the names, which start the sample keys of a source.

The paper's tables disagree with each other: its totals by kind are lower than the sums of its rows (`totals`). The rows
are kept.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from gve.data.curriculum import level_of
from gve.data.schema import check_source_name
from gve.items import InputError

DEVICES = 32
"""GPUs of the published run; a global batch is DEVICES x the published per-device batch."""

PUBLISHED_TOTALS: dict[str, tuple[int, int]] = {
    "text": (380_000, 580_000),
    "image": (1_820_000, 2_800_000),
    "video": (8_800_000, 8_800_000),
    "uvrd": (1_550_000, 1_550_000),
    "all": (12_550_000, 13_730_000),
}
"""Kind -> the totals that the paper prints, for (3B, 7B)."""


@dataclass(frozen=True)
class MixtureRow:
    """One training source as published.

    Args:
        name: of the source in shards and configurations.
        data: what the paper calls the data set.
        task: modality task, for example "T2V".
        level: pyramid level of the task.
        size_3b, size_7b: pairs in the training set of the 3B and of the 7B model.
        negatives: hard negatives per pair.
        batch: rows of a step per device.
        instruction: query instruction (ours).
        reader: of gve.data.readers; "listing" where a data set has no reader and is built from a jsonl or csv listing.
        get: where its files come from, and their form.
        licence: as far as known; empty: ask its owner.
        note: what to know before it is built; may be empty.
    """

    name: str
    data: str
    task: str
    level: int
    size_3b: int
    size_7b: int
    negatives: int
    batch: int
    instruction: str
    reader: str
    get: str
    licence: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        check_source_name(self.name)
        if self.level != level_of(self.task):
            raise InputError(f"{self.name}: level {self.level}, but {self.task} is of level {level_of(self.task)}")
        if min(self.size_3b, self.size_7b, self.batch) < 1 or self.negatives < 0 or not self.instruction:
            raise InputError(
                f"{self.name}: sizes and batch are above 0, negatives not below, the instruction not empty"
            )

    @property
    def global_batch(self) -> int:
        """Rows of a step over all devices of the published run."""
        return self.batch * DEVICES

    @property
    def kind(self) -> str:
        """Under which total the paper counts it: "text", "image", "video" or "uvrd"."""
        if self.name.startswith("uvrd_"):
            return "uvrd"
        return "text" if self.task == "T2T" else "video" if "V" in self.task else "image"

    def size(self, model: str) -> int:
        """Published pairs for a model size, "3b" or "7b"."""
        return {"3b": self.size_3b, "7b": self.size_7b}[model]


@lru_cache(maxsize=1)
def mixture() -> dict[str, MixtureRow]:
    """The 38 sources by name, in the order of the paper's tables.

    Raises:
        InputError: a row of the file does not hold.
    """
    numbers = {field.name for field in fields(MixtureRow) if field.type == "int"}
    rows: dict[str, MixtureRow] = {}
    with open(Path(__file__).with_name("mixture.csv"), encoding="utf-8", newline="") as file:
        for values in csv.DictReader(file):
            row = MixtureRow(**{name: int(text) if name in numbers else text for name, text in values.items()})  # type: ignore[arg-type]
            if row.name in rows:
                raise InputError(f"mixture.csv names {row.name} twice")
            rows[row.name] = row
    return rows


def totals(rows: Sequence[MixtureRow]) -> dict[str, tuple[int, int]]:
    """Kind -> pairs of these rows for (3B, 7B); "all" is their sum."""
    sums = {kind: [0, 0] for kind in PUBLISHED_TOTALS}
    for row in rows:
        for kind in (row.kind, "all"):
            sums[kind][0] += row.size_3b
            sums[kind][1] += row.size_7b
    return {kind: (small, large) for kind, (small, large) in sums.items()}


def settings(*, uvrd: bool = True) -> dict[str, dict[str, int]]:
    """`batch_size` and `negatives` of the DataModule as published.

    Args:
        uvrd: False leaves the synthesised sources out by a batch of 0 (GVE-i).
    """
    rows = mixture().values()
    return {
        "batch_size": {row.name: row.global_batch if uvrd or row.kind != "uvrd" else 0 for row in rows},
        "negatives": {row.name: row.negatives for row in rows},
    }


def summary() -> dict[str, Any]:
    """All rows, their totals and the published ones, in JSON-able form."""
    rows = list(mixture().values())
    return {
        "devices": DEVICES,
        "sources": [
            {field.name: getattr(row, field.name) for field in fields(row)} | {"global_batch": row.global_batch}
            for row in rows
        ],
        "totals": {
            kind: {
                "3b": small,
                "7b": large,
                "published_3b": PUBLISHED_TOTALS[kind][0],
                "published_7b": PUBLISHED_TOTALS[kind][1],
            }
            for kind, (small, large) in totals(rows).items()
        },
    }
