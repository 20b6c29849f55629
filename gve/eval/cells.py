"""The cells of ablation tables: a model's score under each ablation, and what the ablation changed.

A row is one ablation on one set or ability: value, its 95% interval over queries, the difference from the plain run
paired by query with its interval, and the hash of the protocol that the row was measured under. The plain run's own
rows stand first, without a difference. `ablation.csv` holds the rows; `ablation.json` also what each ablation changed.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gve
from gve.encode.encoder import BackboneEncoder
from gve.encode.store import EmbeddingStore
from gve.eval.ablation import PLAIN, Ablation, same_inputs
from gve.eval.evaluation import Scores, evaluate
from gve.eval.results import Results, write_whole
from gve.eval.uvrb import ABILITIES, ABILITY_PARTS, AVERAGES, RetrievalSet
from gve.inputs import InputBuilder, InputPolicy
from gve.items import InputError

CELLS_CSV, CELLS_JSON = "ablation.csv", "ablation.json"


@dataclass(frozen=True)
class Cell:
    """One number of an ablation table.

    Args:
        ablation: its name; "plain" for the run itself.
        scope: "set" or "ability".
        on: which set or ability.
        metric: of the set ("recall_at_1", ...); "mean" for an ability.
        value: score in [0, 1].
        low, high: its 95% interval over queries.
        difference: value minus the plain run's, paired by query; None for the plain run.
        difference_low, difference_high: its 95% interval.
        n_query: queries behind it.
        complete: whether every item was read and the pools are the protocol's; abilities are made of complete sets
            alone.
        protocol: hash of inputs, data and instructions, and of what was not shown.
        weights: hash of the weights that answered.
    """

    ablation: str
    scope: str
    on: str
    metric: str
    value: float
    low: float
    high: float
    difference: float | None
    difference_low: float | None
    difference_high: float | None
    n_query: int
    complete: bool
    protocol: str
    weights: str


@dataclass(frozen=True, eq=False)
class Condition:
    """What a model scored under one ablation.

    Args:
        ablation: the condition.
        scores: set -> score; the sets that the ablation says nothing about are left out.
        policy: the input policy it ran with.
        weights: hash of the weights that answered.
    """

    ablation: Ablation
    scores: Scores
    policy: InputPolicy
    weights: str


def score_ablation(
    ablation: Ablation,
    encoder: BackboneEncoder,
    sets: Sequence[RetrievalSet],
    store: EmbeddingStore,
    *,
    folder: Path | None = None,
    progress: str = "",
) -> Condition:
    """Scores the sets under one ablation; a collective where ranks exist.

    What the ablation does not touch keeps the vector that the store has: under other frames the texts, under another
    prompt the corpus. Vectors under another input policy leave memory when this returns.

    Args:
        ablation: the condition. Its `adapters` must be those of `encoder`.
        encoder: the model with the plain run's inputs; its `untrained()` where the adapters are off.
        sets: the plain run's.
        store: of `encoder.fingerprint`, with the vectors of the plain run.
        folder: where vectors under another input policy are kept; None keeps them for this call alone.
        progress: title of the progress bar; none when empty.
    """
    before = encoder.builder.policy
    policy = ablation.policy(before)
    if policy != before:
        # No memory for prepared inputs: no other pass has the same ones.
        encoder = BackboneEncoder(
            encoder.backbone,
            InputBuilder(encoder.builder.tokenizer, encoder.builder.geometry, policy),
            batch_tokens=encoder.batch_tokens,
            num_workers=encoder.num_workers,
        )
        encoder = encoder if ablation.adapters else encoder.untrained()
        known, store = store, EmbeddingStore(folder, encoder.fingerprint)
        items = (item for tested in sets for item in (*tested.queries, *tested.corpus))
        # In memory alone: they are on the disk already, under the plain run's fingerprint.
        store.adopt(known, [item for item in items if same_inputs(item, before, policy)], write=False)
    scores = evaluate(encoder, ablation.sets(sets), store, ablation=ablation.shown, progress=progress)
    return Condition(ablation, scores, policy, encoder.weights_hash)


def ablation_cells(plain: Results, conditions: Sequence[Condition]) -> list[Cell]:
    """The rows of the plain run and of every ablation: sets, then averages and abilities that have all their sets."""
    cells = _rows(PLAIN, plain.data, {"sets": {}, "abilities": {}})
    for condition in conditions:
        data = _as_results(plain, condition).data
        cells += _rows(condition.ablation.name, data, data["gains"])
    return cells


def _as_results(plain: Results, condition: Condition) -> Results:
    """An ablation is to the plain run what a model is to its base: other scores of the same queries."""
    inputs = condition.policy.to_dict()
    if condition.ablation.shown:
        inputs["shown"] = condition.ablation.shown
    return Results(
        scores=condition.scores,
        untrained=plain.scores,
        inputs=inputs,
        weights_hash=condition.weights,
        untrained_weights_hash=plain.weights_hash,
        step=plain.step,
        resamples=plain.resamples,
        model=plain.model,
    )


def _rows(ablation: str, data: Mapping[str, Any], gains: Mapping[str, Any]) -> list[Cell]:
    """Cells of the content of a uvrb.json."""

    def cell(
        scope: str, on: str, metric: str, value: float, bounds: Sequence[float], *, n_query: int, complete: bool = True
    ) -> Cell:
        gain = gains["sets" if scope == "set" else "abilities"].get(on)
        difference, low, high = (gain["value"], *gain["interval"]) if gain else (None, None, None)
        return Cell(
            ablation=ablation,
            scope=scope,
            on=on,
            metric=metric,
            value=value,
            low=bounds[0],
            high=bounds[1],
            difference=difference,
            difference_low=low,
            difference_high=high,
            n_query=n_query,
            complete=complete,
            protocol=data["protocol"]["hash"],
            weights=data["weights"],
        )

    cells = [
        cell(
            "set", name, row["metric"], row["value"], row["interval"], n_query=row["n_query"], complete=row["complete"]
        )
        for name, row in data["sets"].items()
    ]
    for name in (*AVERAGES, *ABILITIES):
        if (value := data["abilities"][name]) is not None:
            queries = sum(data["sets"][leaf]["n_query"] for leaf in _sets_of(name))
            cells.append(cell("ability", name, "mean", value, data["ability_intervals"][name], n_query=queries))
    return cells


def _sets_of(name: str) -> set[str]:
    """The sets behind an ability or average; of a set, itself."""
    return {leaf for part in ABILITY_PARTS[name] for leaf in _sets_of(part)} if name in ABILITY_PARTS else {name}


def write_cells(folder: Path, plain: Results, conditions: Sequence[Condition]) -> list[Cell]:
    """Writes ablation.csv and ablation.json, each whole or not at all; without conditions removes an earlier run's.

    Returns:
        Their rows.
    """
    if not conditions:
        for name in (CELLS_CSV, CELLS_JSON):
            (folder / name).unlink(missing_ok=True)
        return []
    cells = ablation_cells(plain, conditions)
    content: dict[str, Any] = {
        "version": gve.__version__,
        "model": plain.model,
        "step": plain.step,
        "resamples": plain.resamples,
        "ablations": {
            condition.ablation.name: {
                "shown": condition.ablation.shown,
                "instruction": condition.ablation.instruction,
                "adapters": condition.ablation.adapters,
                "inputs": condition.policy.to_dict(),
            }
            for condition in conditions
        },
        "cells": [dataclasses.asdict(cell) for cell in cells],
    }
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in dataclasses.fields(Cell)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(content["cells"])
    write_whole(folder / CELLS_CSV, text.getvalue().encode())
    write_whole(folder / CELLS_JSON, (json.dumps(content, indent=1) + "\n").encode())
    return cells


def read_cells(folder: str | Path) -> list[Cell]:
    """The rows of the ablation.json in a folder; none where no ablation was run.

    Raises:
        InputError: it cannot be read.
    """
    path = Path(folder) / CELLS_JSON
    if not path.is_file():
        return []
    try:
        return [Cell(**row) for row in json.loads(path.read_text())["cells"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read as ablation cells ({error}); run the evaluation again") from None


def cell_table(cells: Sequence[Cell], scope: str = "ability") -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table for people: an ablation a row, a set or ability a column.

    A cell is the score, then the paired difference with its interval, marked where the interval leaves 0 out.
    """
    columns = list(dict.fromkeys(cell.on for cell in cells if cell.scope == scope))
    known = {(cell.ablation, cell.on): cell for cell in cells if cell.scope == scope}
    rows = []
    for name in dict.fromkeys(cell.ablation for cell in cells):
        rows.append([name, *(_told(known.get((name, column))) for column in columns)])
    return ["ablation", *columns], rows


def _told(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    value = f"{cell.value:.3f}" + ("" if cell.complete else " (incomplete)")
    if cell.difference is None or cell.difference_low is None or cell.difference_high is None:
        return value
    mark = "*" if cell.difference_low > 0 or cell.difference_high < 0 else ""
    # Adding 0 turns the -0 of a difference that is rounded away into 0.
    shown, low, high = (round(one, 3) + 0.0 for one in (cell.difference, cell.difference_low, cell.difference_high))
    return f"{value}, {shown:+.3f}{mark} [{low:+.3f}, {high:+.3f}]"
