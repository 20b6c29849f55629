"""What an evaluation found, as files: uvrb.json, the positions of every query, run.json; and how to read them back.

uvrb.json holds what the model and the data decide and nothing else: two runs of equal weights over equal data are equal
byte for byte, whatever the order of the listings, the number of ranks and the machine's speed. Time, place and hardware
stand in run.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

import gve
from gve.eval.evaluation import Scores, SetScore
from gve.eval.statistics import difference_interval, holm, interval, joint_bootstrap_means, p_value
from gve.eval.uvrb import SETS, ability_scores
from gve.items import InputError

RESULTS, POSITIONS, RUN = "uvrb.json", "uvrb_positions.npz", "run.json"
_UNREADABLE = (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error)
"""What numpy raises at a damaged npz, and what wrong types in the JSON beside it lead to."""
_PER_QUERY = ("hits", "greater", "tied", "tied_positives", "nearest", "similarities")


@dataclass(frozen=True, eq=False)
class Results:
    """One evaluation.

    Args:
        scores: set -> score of the model.
        untrained: set -> score of the base with its adapters off; empty if it was not run.
        ablations: ablation -> set -> score of the model under it.
        inputs: the evaluation's input policy, as plain values.
        weights_hash: of the model.
        untrained_weights_hash: of the base.
        step: optimizer steps the model was trained for.
        resamples: bootstrap replicates behind every interval.
        model: its name as the user gave it.
        setting: what this run may differ in from another of the same model: frames, tokens a frame, prompt, ...
    """

    scores: Scores
    untrained: Scores = field(default_factory=dict)
    ablations: Mapping[str, Scores] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)
    weights_hash: str = ""
    untrained_weights_hash: str = ""
    step: int = 0
    resamples: int = 10000
    model: str = ""
    setting: Mapping[str, Any] = field(default_factory=dict)

    @property
    def abilities(self) -> dict[str, float | None]:
        """The nine abilities and two averages; None where a set is missing or incomplete."""
        return _abilities(self.scores, lambda score: score.value)

    @property
    def chance(self) -> dict[str, float | None]:
        """Abilities of a random order."""
        return _abilities(self.scores, lambda score: score.chance)

    def metrics(self) -> dict[str, float]:
        """TensorBoard tag -> value: `uvrb/<set>/<metric>`, `uvrb/ability/<name>`; none for what lacks a set."""
        tags = {f"uvrb/{name}/{score.tested.record.metric}": score.value for name, score in self.scores.items()}
        return tags | {f"uvrb/ability/{name}": value for name, value in self.abilities.items() if value is not None}

    @cached_property
    def data(self) -> dict[str, Any]:
        """The content of uvrb.json, plain values."""
        protocol = {
            "inputs": dict(self.inputs),
            "sets": {
                name: [score.tested.data_hash, len(score.tested.queries), score.tested.record.instruction]
                for name, score in self.scores.items()
            },
        }
        rows = self._rows(self.scores)
        for name, row in rows.items():
            facts = self.scores[name].tested.facts
            row["ceilings"] = dict(facts.get("ceilings", {}))
            row["ablations"] = {kind: scores[name].value for kind, scores in self.ablations.items() if name in scores}
        out: dict[str, Any] = {
            "version": gve.__version__,
            "model": self.model,
            "setting": dict(self.setting),
            "protocol": {"hash": _digest(protocol), **protocol},
            "weights": self.weights_hash,
            "step": self.step,
            "sets": rows,
            **self._ability_rows(self.scores),
        }
        if self.untrained:
            out["untrained"] = {
                "weights": self.untrained_weights_hash,
                "sets": self._rows(self.untrained),
                **self._ability_rows(self.untrained),
            }
            out["gains"] = self._gains()
        return out

    def _rows(self, scores: Scores) -> dict[str, dict[str, Any]]:
        rows = {}
        for name, score in scores.items():
            rows[name] = {
                **self._row(score),
                "complete": score.complete,
                "missing": [f"{item}: {reason}" for item, reason in sorted(score.unread.items())],
                "notes": list(score.notes),
            }
            if (whole := score.whole_corpus) is not None:
                rows[name]["whole_corpus"] = self._row(whole) | {"metric": f"recall_at_{whole.tested.record.k}"}
        return rows

    def _row(self, score: SetScore) -> dict[str, Any]:
        return {
            "metric": score.tested.record.metric,
            "value": score.value,
            "interval": list(score.interval(self.resamples)),
            "optimistic": score.optimistic,
            "pessimistic": score.pessimistic,
            "chance": score.chance,
            "n_query": len(score.tested.queries),
            "n_corpus": len(score.tested.corpus),
            "n_candidates": len(score.tested.pools[0]) if score.tested.pools else len(score.tested.corpus),
        }

    def _ability_rows(self, scores: Scores) -> dict[str, Any]:
        replicates = ability_scores(
            joint_bootstrap_means(
                {name: score.hits for name, score in scores.items() if score.complete},
                {name: score.clusters for name, score in scores.items()},
                resamples=self.resamples,
            )
        )
        intervals = {name: None if values is None else list(interval(values)) for name, values in replicates.items()}
        collapsed = [name for name, own in intervals.items() if own is not None and own[0] == own[1]]
        if collapsed:
            # No query or every query hit: all replicates are equal. The mean of the sets' exact bounds is wider than
            # the interval of the mean, and no lie. Each bound costs a bootstrap, so only where it is needed.
            bounds = {name: score.interval(self.resamples) for name, score in scores.items()}
            low = _abilities(scores, lambda score: bounds[score.tested.record.name][0])
            high = _abilities(scores, lambda score: bounds[score.tested.record.name][1])
            intervals |= {name: [low[name], high[name]] for name in collapsed}
        return {
            "abilities": _abilities(scores, lambda score: score.value),
            "ability_intervals": intervals,
            "ability_chance": _abilities(scores, lambda score: score.chance),
        }

    def _gains(self) -> dict[str, Any]:
        """Trained minus untrained, paired by query: value, 95% interval and, for sets, Holm-adjusted p."""
        shared = [name for name in self.scores if name in self.untrained]
        differences = {name: self.scores[name].hits - self.untrained[name].hits for name in shared}
        return paired_rows(
            differences,
            {name: self.scores[name].clusters for name in shared},
            {name for name in shared if self.scores[name].complete and self.untrained[name].complete},
            self.resamples,
        )


def paired_rows(
    differences: Mapping[str, np.ndarray],
    clusters: Mapping[str, np.ndarray],
    complete: Collection[str],
    resamples: int,
) -> dict[str, Any]:
    """One model minus another, paired by query: value, 95% interval and, for sets, p-values.

    Args:
        differences: set -> [Q] scores of the one minus those of the other.
        clusters: set -> [Q] int64, equal where queries share a video, in one set or in two.
        complete: sets that may enter an average.
        resamples: bootstrap replicates.

    Returns:
        sets: name -> value, interval, p (bootstrap, two-sided), p_holm (adjusted over the sets of UVRB here; over the
        others, such as classification, apart); abilities: name -> value, interval, if all their sets are complete.
    """
    draws = joint_bootstrap_means(differences, clusters, resamples=resamples)
    p_values = {name: p_value(draw) for name, draw in draws.items()}
    family = {record.name for record in SETS} & p_values.keys()
    adjusted = holm({name: p_values[name] for name in p_values if name in family})
    adjusted |= holm({name: p_values[name] for name in p_values if name not in family})
    bounds = {name: difference_interval(own, clusters[name], draws[name]) for name, own in differences.items()}
    means = {name: float(own.mean()) for name, own in differences.items()}
    whole = [name for name in differences if name in complete]
    values = ability_scores({name: means[name] for name in whole})
    replicates = ability_scores({name: draws[name] for name in whole})
    # Where no query of any set differs the replicates have no width; the mean of the sets' bounds then takes over.
    low = ability_scores({name: bounds[name][0] for name in whole})
    high = ability_scores({name: bounds[name][1] for name in whole})
    abilities = {}
    for name, draw in replicates.items():
        if draw is not None:
            own = [low[name], high[name]] if not np.any(draw) else list(interval(draw))
            abilities[name] = {"value": values[name], "interval": own}
    return {
        "sets": {
            name: {
                "value": means[name],
                "interval": list(bounds[name]),
                "p": p_values[name],
                "p_holm": adjusted[name],
            }
            for name in differences
        },
        "abilities": abilities,
    }


def _abilities(scores: Scores, what: Callable[[SetScore], Any]) -> dict[str, Any]:
    return ability_scores({name: what(score) for name, score in scores.items() if score.complete})


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file of this content under another name and renames it: a reader never meets a half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".tmp")
    draft.write_bytes(content)
    os.replace(draft, path)


def write_json(path: Path, results: Results) -> None:
    """Writes the results' JSON; whole or not at all."""
    write_whole(path, (json.dumps(results.data, indent=1) + "\n").encode())


def write_run(folder: Path, facts: Mapping[str, Any]) -> None:
    """Writes run.json: what is no result of the model, such as the root of the sets, the hardware and the seconds."""
    write_whole(folder / RUN, (json.dumps(facts, indent=1) + "\n").encode())


def write_positions(folder: Path, results: Results) -> None:
    """Writes uvrb_positions.npz: what every query found. Arrays only, to be read with allow_pickle off.

    Keys are `<set>/<model>/<array>`, model being "model" or "untrained". Beside them stand `<set>/queries` and
    `<set>/corpus` (ids), `<set>/clusters`, and `<set>/positives`, corpus rows of all queries end to end, of which query
    q has those from `<set>/positive_starts`[q] to [q + 1].
    """
    arrays: dict[str, np.ndarray] = {}
    for model, scores in (("model", results.scores), ("untrained", results.untrained)):
        for name, score in scores.items():
            tested = score.tested
            arrays[f"{name}/queries"] = np.array([item.id for item in tested.queries])
            arrays[f"{name}/corpus"] = np.array([item.id for item in tested.corpus])
            arrays[f"{name}/clusters"] = score.clusters
            arrays[f"{name}/positives"] = np.array([row for rows in tested.positives for row in rows], np.int64)
            arrays[f"{name}/positive_starts"] = np.cumsum([0, *map(len, tested.positives)], dtype=np.int64)
            own = {
                "hits": score.hits,
                "greater": score.counts.greater,
                "tied": score.counts.tied,
                "tied_positives": score.counts.tied_positives,
                "nearest": score.nearest,
                "similarities": score.similarities,
            }
            arrays |= {f"{name}/{model}/{key}": value for key, value in own.items()}
    path = folder / POSITIONS
    folder.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp.npz")
    np.savez_compressed(draft, allow_pickle=False, **arrays)
    os.replace(draft, path)


@dataclass(frozen=True, eq=False)
class SavedScore:
    """One set of a saved evaluation, query by query.

    Args:
        row: the set's part of uvrb.json.
        queries: [Q] ids.
        corpus: [C] ids.
        clusters: [Q] int64, equal where queries share a video and are resampled together.
        positives: corpus rows that answer each query.
        hits: [Q] float64 in [0, 1], score of each query, the expectation over ties.
        greater: [Q] int64, candidates above the best positive.
        tied: [Q] int64, candidates level with it, itself among them.
        tied_positives: [Q] int64, the positives among `tied`; 0 where no positive could be read.
        nearest: [Q, 10 or more] int64, corpus rows by falling similarity, -1 beyond the end of a pool.
        similarities: float32 of that shape, -inf there.
    """

    row: Mapping[str, Any]
    queries: np.ndarray
    corpus: np.ndarray
    clusters: np.ndarray
    positives: tuple[np.ndarray, ...]
    hits: np.ndarray
    greater: np.ndarray
    tied: np.ndarray
    tied_positives: np.ndarray
    nearest: np.ndarray
    similarities: np.ndarray


@dataclass(frozen=True, eq=False)
class SavedResults:
    """A saved evaluation.

    Args:
        folder: where it lies.
        data: the content of uvrb.json.
        run: the content of run.json beside it or one folder up (`gve uvrb run`); empty where there is none.
        sets: set -> what every query found; empty where no positions were written (inside `gve fit`).
        untrained: the same of the base with its adapters off.
    """

    folder: Path
    data: Mapping[str, Any]
    run: Mapping[str, Any]
    sets: Mapping[str, SavedScore]
    untrained: Mapping[str, SavedScore]


def read_results(path: str | Path) -> SavedResults:
    """An evaluation as `gve uvrb run`, `gve validate` or `gve test` left it.

    Args:
        path: the folder of a uvrb.json, or that file.

    Raises:
        InputError: there is none, it cannot be read, or the positions beside it are of another run.
    """
    file = Path(path) / RESULTS if Path(path).is_dir() else Path(path)
    data = _object(file)
    if not all(isinstance(data.get(name), dict) for name in ("sets", "protocol", "abilities")):
        raise InputError(f"{file} is no result of gve: it lacks sets, protocol or abilities")
    runs = [place for place in (file.parent / RUN, file.parent.parent / RUN) if place.is_file()]
    positions = file.parent / POSITIONS
    sets: dict[str, SavedScore] = {}
    untrained: dict[str, SavedScore] = {}
    if file.name == RESULTS and positions.is_file():
        try:
            with np.load(positions, allow_pickle=False) as arrays:
                sets = {name: _score(arrays, name, "model", row) for name, row in data["sets"].items()}
                base = data.get("untrained", {"sets": {}})["sets"]
                untrained = {name: _score(arrays, name, "untrained", row) for name, row in base.items()}
        except _UNREADABLE as error:
            raise InputError(f"{positions} cannot be read beside {file} ({error}); run the evaluation again") from None
    return SavedResults(file.parent, data, _object(runs[0]) if runs else {}, sets, untrained)


def read_runs(path: str | Path) -> list[SavedResults]:
    """All settings of a run: of the folder given to `gve uvrb run --out`, or the one evaluation that `path` is.

    Raises:
        InputError: there is none, or one cannot be read.
    """
    folder = Path(path)
    if not folder.is_dir() or (folder / RESULTS).is_file():
        return [read_results(folder)]
    settings = _object(folder / RUN).get("settings", []) if (folder / RUN).is_file() else []
    if not settings:
        raise InputError(f"{folder} holds no evaluation: no {RESULTS}, and no {RUN} that names settings")
    return [read_results(folder / name) for name in settings]


def _score(arrays: Mapping[str, np.ndarray], name: str, model: str, row: Mapping[str, Any]) -> SavedScore:
    starts, flat = arrays[f"{name}/positive_starts"], arrays[f"{name}/positives"]
    own = {key: arrays[f"{name}/{model}/{key}"] for key in _PER_QUERY}
    if len(own["hits"]) != row["n_query"] or abs(float(own["hits"].mean()) - row["value"]) > 1e-9:
        raise ValueError(f"{name} has other queries or another value")
    return SavedScore(
        row=row,
        queries=arrays[f"{name}/queries"],
        corpus=arrays[f"{name}/corpus"],
        clusters=arrays[f"{name}/clusters"],
        positives=tuple(np.split(flat, starts[1:-1])),
        **own,
    )


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object")
    return value
