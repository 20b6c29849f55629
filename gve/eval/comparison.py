"""Two evaluations query by query: the same data, the same protocol, the difference with its interval."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gve.eval.results import SavedResults, SavedScore, paired_rows
from gve.items import InputError

PROTOCOL_INPUTS = ("sampling", "max_frame_tokens", "max_length")
"""Inputs that the benchmark's protocol fixes for every model; the others (prompt, pooling, ...) make up a model."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """One evaluation minus another.

    Args:
        baseline, model: labels of the two.
        notes: what a reader must know before a number: settings that differ, incomplete sets, ties.
        sets: set -> baseline, model, value (model minus baseline), interval, p, p_holm, n_query, complete, ties: for
            both the [pessimistic, optimistic] values.
        abilities: ability or average -> value, interval; those alone whose sets are all complete in both.
    """

    baseline: str
    model: str
    notes: tuple[str, ...]
    sets: Mapping[str, Mapping[str, Any]]
    abilities: Mapping[str, Mapping[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "baseline": self.baseline,
            "model": self.model,
            "notes": list(self.notes),
            "sets": {name: dict(row) for name, row in self.sets.items()},
            "abilities": {name: dict(row) for name, row in self.abilities.items()},
        }


def run_labels(runs: Sequence[SavedResults]) -> list[str]:
    """A name for each run that tells it from the others: the model, then the settings that differ, then the folder."""
    models = [str(run.data.get("model") or run.folder.resolve().name) for run in runs]
    # A model given as a path is called by its file; its folder comes back below where two have one file name.
    names = [Path(model).name if Path(model).is_absolute() or model.startswith(".") else model for model in models]
    settings = [run.data.get("setting", {}) for run in runs]
    labels = []
    for name, setting in zip(names, settings, strict=True):
        others = [other for named, other in zip(names, settings, strict=True) if named == name]
        varying = [key for key in setting if any(other.get(key) != setting[key] for other in others)]
        own = ", ".join(f"{key} {_plain(setting[key])}" for key in varying)
        labels.append(f"{name} ({own})" if own else name)
    for place, run in enumerate(runs):
        if labels.count(labels[place]) > 1:
            labels[place] = f"{labels[place]} in {run.folder}"
    return [
        label if labels[:place].count(label) == 0 else f"{label} [{labels[:place].count(label) + 1}]"
        for place, label in enumerate(labels)
    ]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def protocol_differences(baseline: Mapping[str, Any], model: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What the protocols of two results do not share.

    Args:
        baseline, model: contents of two uvrb.json.

    Returns:
        (data, settings), one phrase each: other data never compare; other settings (frames, tokens, length) only where
        the question is about them.
    """
    data = []
    for name in shared_sets(baseline, model):
        first, second = baseline["sets"][name], model["sets"][name]
        old, new = baseline["protocol"]["sets"][name], model["protocol"]["sets"][name]
        facts = {
            "data hash": (str(old[0])[:12], str(new[0])[:12]),
            "instruction": (old[2], new[2]),
            **{key: (first[key], second[key]) for key in ("metric", "n_query", "n_corpus", "n_candidates")},
        }
        data += [f"{name}: {fact} {one} against {other}" for fact, (one, other) in facts.items() if one != other]
    old, new = baseline["protocol"]["inputs"], model["protocol"]["inputs"]
    same_weights = bool(baseline["weights"]) and baseline["weights"] == model["weights"]
    keys = old.keys() & new.keys() if same_weights else set(PROTOCOL_INPUTS) & old.keys() & new.keys()
    settings = [f"{key} {_plain(old[key])} against {_plain(new[key])}" for key in sorted(keys) if old[key] != new[key]]
    return data, settings


def shared_sets(baseline: Mapping[str, Any], model: Mapping[str, Any]) -> list[str]:
    """Sets that two results have both, in the order of the first."""
    return [name for name in baseline["sets"] if name in model["sets"]]


def compare(
    baseline: SavedResults,
    model: SavedResults,
    labels: tuple[str, str],
    *,
    across_settings: bool = False,
    resamples: int = 10000,
) -> Comparison:
    """The second evaluation minus the first, paired by query id.

    Args:
        labels: what to call the two.
        across_settings: allow other frames, tokens or lengths; the notes then name them.
        resamples: bootstrap replicates.

    Raises:
        InputError: no set in common, other data, another protocol, or no per-query file beside one of them.
    """
    for label, run in zip(labels, (baseline, model), strict=True):
        if not run.sets:
            raise InputError(f"{label}: {run.folder} has no uvrb_positions.npz; only whole runs can be paired by query")
    names = shared_sets(baseline.data, model.data)
    if not names:
        raise InputError(f"{labels[0]} and {labels[1]} have no set in common")
    data, settings = protocol_differences(baseline.data, model.data)
    if data:
        raise InputError(f"{labels[0]} and {labels[1]} did not run on the same data: {_some(data)}")
    if settings and not across_settings:
        raise InputError(
            f"{labels[0]} and {labels[1]} ran under different settings: {_some(settings)}; "
            "give --across-settings if that is the question"
        )
    differences, clusters = {}, {}
    for name in names:
        first, second = baseline.sets[name], model.sets[name]
        rows = _same_queries(name, first, second)
        differences[name] = second.hits[rows] - first.hits
        clusters[name] = first.clusters
    complete = {name for name in names if baseline.sets[name].row["complete"] and model.sets[name].row["complete"]}
    found = paired_rows(differences, clusters, complete, resamples)
    sets = {}
    for name, row in found["sets"].items():
        before, after = baseline.sets[name].row, model.sets[name].row
        sets[name] = {
            "baseline": before["value"],
            "model": after["value"],
            "difference": row["value"],
            "interval": row["interval"],
            "p": row["p"],
            "p_holm": row["p_holm"],
            "n_query": before["n_query"],
            "complete": name in complete,
            "ties": [[own["pessimistic"], own["optimistic"]] for own in (before, after)],
        }
    abilities = {
        name: {
            "baseline": baseline.data["abilities"][name],
            "model": model.data["abilities"][name],
            "difference": row["value"],
            "interval": row["interval"],
        }
        for name, row in found["abilities"].items()
    }
    notes = _notes(baseline.data, model.data, labels, settings, complete)
    return Comparison(*labels, tuple(notes), sets, abilities)


def _some(phrases: Sequence[str], shown: int = 3) -> str:
    more = f"; and {len(phrases) - shown} more" if len(phrases) > shown else ""
    return "; ".join(phrases[:shown]) + more


def _same_queries(name: str, first: SavedScore, second: SavedScore) -> np.ndarray:
    """Rows of the second's queries in the order of the first's.

    Raises:
        InputError: they are not the same queries.
    """
    place = {query: row for row, query in enumerate(second.queries.tolist())}
    lacking = [query for query in first.queries.tolist() if query not in place]
    if lacking or len(place) != len(first.queries):
        raise InputError(f"{name}: the two runs asked other queries, for example {(lacking or list(place))[0]!r}")
    return np.array([place[query] for query in first.queries.tolist()], np.int64)


def _notes(
    baseline: Mapping[str, Any],
    model: Mapping[str, Any],
    labels: tuple[str, str],
    settings: Sequence[str],
    complete: Collection[str],
) -> list[str]:
    notes = [f"settings differ: {phrase}" for phrase in settings]
    for label, own, other in ((labels[0], baseline, model), (labels[1], model, baseline)):
        if only := [name for name in own["sets"] if name not in other["sets"]]:
            notes.append(f"only {label} ran {', '.join(only)}")
        for name in shared_sets(baseline, model):
            row = own["sets"][name]
            if name not in complete and not row["complete"]:
                why = f"{len(row['missing'])} unread, {row['missing'][0]}" if row["missing"] else "not its own protocol"
                notes.append(f"{label}: {name} is incomplete and enters no average ({why})")
    if baseline["weights"] and baseline["weights"] == model["weights"]:
        notes.append("both runs have the same weights")
    return notes
