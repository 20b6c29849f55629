"""What an evaluation leaves behind: uvrb.json, report.md, radar.png, the positions of every query, a terminal table."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.projections.polar import PolarAxes
from rich.table import Table

import gve
from gve.eval.evaluation import Scores, SetScore
from gve.eval.statistics import holm, interval, p_value
from gve.eval.uvrb import ABILITIES, AVERAGES, SETS, ability_scores, published_scores

TIE_ALARM = 0.001  # optimistic minus pessimistic: above it, ties (a collapsed model?) carry the score
PUBLISHED_SHOWN = ("GVE-3B", "GVE-7B")


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
    """

    scores: Scores
    untrained: Scores = field(default_factory=dict)
    ablations: Mapping[str, Scores] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)
    weights_hash: str = ""
    untrained_weights_hash: str = ""
    step: int = 0
    resamples: int = 10000

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
        return {
            name: {
                "metric": score.tested.record.metric,
                "value": score.value,
                "interval": list(score.interval(self.resamples)),
                "optimistic": score.optimistic,
                "pessimistic": score.pessimistic,
                "chance": score.chance,
                "n_query": len(score.tested.queries),
                "n_corpus": len(score.tested.corpus),
                "n_candidates": len(score.tested.pools[0]) if score.tested.pools else len(score.tested.corpus),
                "complete": score.complete,
                "missing": [f"{item}: {reason}" for item, reason in sorted(score.unread.items())],
                "notes": list(score.tested.notes),
            }
            for name, score in scores.items()
        }

    def _ability_rows(self, scores: Scores) -> dict[str, Any]:
        replicates = _abilities(scores, lambda score: score.replicates(self.resamples))
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
        draws = {name: self.scores[name].difference(self.untrained[name], self.resamples) for name in shared}
        adjusted = holm({name: p_value(draw) for name, draw in draws.items()})
        complete = {name: draw for name, draw in draws.items() if self.scores[name].complete}
        before = _abilities(self.untrained, lambda score: score.value)
        gains = {}
        for name, draw in ability_scores(complete).items():
            now, then = self.abilities[name], before[name]
            if draw is not None and now is not None and then is not None:
                gains[name] = {"value": now - then, "interval": list(interval(draw))}
        return {
            "sets": {
                name: {
                    "value": self.scores[name].value - self.untrained[name].value,
                    "interval": list(interval(draws[name])),
                    "p_holm": adjusted[name],
                }
                for name in shared
            },
            "abilities": gains,
        }


def _abilities(scores: Scores, what: Callable[[SetScore], Any]) -> dict[str, Any]:
    return ability_scores({name: what(score) for name, score in scores.items() if score.complete})


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _write(path: Path, content: bytes) -> None:
    draft = path.with_name(path.name + ".tmp")
    draft.write_bytes(content)
    os.replace(draft, path)


def write_json(path: Path, results: Results) -> None:
    """Writes the results' JSON; whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, (json.dumps(results.data, indent=1) + "\n").encode())


def write_report(folder: Path, results: Results) -> None:
    """Writes radar.png, uvrb_positions.npz, report.md and last uvrb.json, which says that the rest is there."""
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / "radar.tmp.png"
    radar(results.data).savefig(draft, dpi=160)
    os.replace(draft, folder / "radar.png")
    _write_positions(folder / "uvrb_positions.npz", results)
    _write(folder / "report.md", report(results).encode())
    write_json(folder / "uvrb.json", results)


def _write_positions(path: Path, results: Results) -> None:
    """Per query: score, counts above and level, and the nearest ten; arrays only, read it with allow_pickle off.

    Keys are `<set>/<model>/<array>`; `<set>/queries` and `<set>/corpus` hold the ids.
    """
    arrays: dict[str, np.ndarray] = {}
    for model, scores in (("model", results.scores), ("untrained", results.untrained)):
        for name, score in scores.items():
            arrays[f"{name}/queries"] = np.array([item.id for item in score.tested.queries])
            arrays[f"{name}/corpus"] = np.array([item.id for item in score.tested.corpus])
            own = {
                "hits": score.hits,
                "greater": score.counts.greater,
                "tied": score.counts.tied,
                "tied_positives": score.counts.tied_positives,
                "nearest": score.nearest,
                "similarities": score.similarities,
            }
            arrays |= {f"{name}/{model}/{key}": value for key, value in own.items()}
    draft = path.with_suffix(".tmp.npz")
    np.savez_compressed(draft, allow_pickle=False, **arrays)
    os.replace(draft, path)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _with_interval(value: float | None, bounds: Sequence[float] | None) -> str:
    return "-" if value is None or bounds is None else f"{value:.3f} [{bounds[0]:.3f}, {bounds[1]:.3f}]"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    right = "|".join(["---"] + ["---:"] * (len(head) - 1))
    return [f"| {' | '.join(head)} |", f"|{right}|", *(f"| {' | '.join(row)} |" for row in rows), ""]


def report(results: Results) -> str:
    """The text of report.md."""
    data = results.data
    lines = [
        "# UVRB report",
        "",
        f"gve {data['version']}, {data['step']} training steps, weights `{data['weights'][:12]}`, "
        f"protocol `{data['protocol']['hash']}`.",
        "",
        *_warnings(data),
        "## Abilities",
        "",
        "![radar of the nine abilities](radar.png)",
        "",
        *_markdown(*_ability_table(results, data)),
        f"Brackets are 95% bootstrap intervals over queries ({results.resamples} resamples, clustered by video). "
        "Gain is trained minus untrained, paired by query.",
        "",
        "## Sets",
        "",
        *_markdown(*_set_table(data)),
        *_ablation_section(results, data),
    ]
    return "\n".join(lines)


def _warnings(data: Mapping[str, Any]) -> list[str]:
    """What a reader must know before a number: incomplete sets, ties, other protocols."""
    lines = []
    for label, part in (("", data), ("untrained: ", data.get("untrained", {"sets": {}}))):
        for name, row in part["sets"].items():
            if row["missing"]:
                lines.append(f"- **{label}{name} is incomplete**: {len(row['missing'])} unread, {row['missing'][0]}")
            if not row["complete"]:
                lines.append(f"- {label}{name} enters no average.")
            if row["optimistic"] - row["pessimistic"] > TIE_ALARM:
                lines.append(
                    f"- {label}{name}: equal similarities decide {row['pessimistic']:.3f} to {row['optimistic']:.3f}."
                )
            lines += [f"- {label}{name}: {note}." for note in row["notes"]]
    absent = [record.name for record in SETS if record.name not in data["sets"]]
    if absent:
        lines.append(f"- Not run: {', '.join(absent)}; averages that need them are left out.")
    return [*lines, ""] if lines else []


def _ability_table(results: Results, data: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    head = ["ability", "trained"] + (["untrained", "gain"] if results.untrained else []) + ["chance"]
    # Published rows stand beside a score of the same benchmark only, never beside a stand-in's.
    genuine = len(results.scores) == len(SETS) and all(s.tested.published_size for s in results.scores.values())
    published = {f"{name} (paper)": published_scores()[name] for name in PUBLISHED_SHOWN} if genuine else {}
    rows = []
    for name in (*AVERAGES, *ABILITIES):
        row = [name, _with_interval(data["abilities"][name], data["ability_intervals"][name])]
        if results.untrained:
            before = data["untrained"]
            row.append(_with_interval(before["abilities"][name], before["ability_intervals"][name]))
            gain = data["gains"]["abilities"].get(name)
            row.append(_with_interval(gain["value"], gain["interval"]) if gain else "-")
        row.append(_number(data["ability_chance"][name]))
        rows.append(row + [_number(scores[name]) for scores in published.values()])
    return head + list(published), rows


def _set_table(data: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    head = ["set", "queries", "corpus", "metric", "trained"]
    head += ["untrained", "p (Holm)"] if "untrained" in data else []
    labels = {record.name: record.metric_label for record in SETS}
    rows = []
    for name, row in data["sets"].items():
        size = f"{row['n_corpus']}" if row["n_candidates"] == row["n_corpus"] else f"{row['n_candidates']} a query"
        line = [name, str(row["n_query"]), size, labels[name], _with_interval(row["value"], row["interval"])]
        if "untrained" in data:
            before = data["untrained"]["sets"][name]
            line.append(_with_interval(before["value"], before["interval"]))
            line.append(f"{data['gains']['sets'][name]['p_holm']:.3f}")
        rows.append([*line, _number(row["chance"])])
    return [*head, "chance"], rows


def _ablation_section(results: Results, data: Mapping[str, Any]) -> list[str]:
    """Each set's score under every ablation beside the ceiling that its data allow."""
    ceilings = sorted({kind for row in data["sets"].values() for kind in row["ceilings"]})
    columns = []
    for kind in dict.fromkeys([*results.ablations, *ceilings]):
        columns += [(kind, "ablations", kind)] if kind in results.ablations else []
        columns += [(f"{kind} ceiling", "ceilings", kind)] if kind in ceilings else []
    if not columns:
        return []
    head = ["set", "trained", *(title for title, _, _ in columns), "chance"]
    rows = []
    for name, row in data["sets"].items():
        shown = [_number(row[part].get(kind)) for _, part, kind in columns]
        rows.append([name, _number(row["value"]), *shown, _number(row["chance"])])
    return [
        "## The same weights, shown less",
        "",
        "static: middle frame repeated; shuffled, reversed: frames in another order; black: black pixels; text_only: "
        "no pictures (a text set's corpus is black); media_only: no text. A ceiling is what a perfect judge scores "
        "with as little.",
        "",
        *_markdown(head, rows),
    ]


def ability_table(results: Results) -> Table:
    """Abilities for the terminal: trained, untrained, chance."""
    head, rows = _ability_table(results, results.data)
    table = Table(title=f"UVRB after {results.step} steps", title_justify="left")
    for place, name in enumerate(head):
        table.add_column(name, justify="left" if place == 0 else "right", no_wrap=True)
    for number, row in enumerate(rows, 1):
        table.add_row(*row, end_section=number == len(AVERAGES))
    return table


def radar(data: Mapping[str, Any]) -> Figure:
    """The nine abilities on nine axes: trained, untrained, chance. An ability that lacks a set is a gap.

    The rim is the next fifth above the largest value, so that small scores can be told apart.

    Args:
        data: the content of a uvrb.json.
    """
    final = data["abilities"]
    lines = [("chance", data["ability_chance"], "#8c8c8c", ":", 0.0)]
    if "untrained" in data:
        lines.append(("untrained", data["untrained"]["abilities"], "#d1813b", "--", 0.08))
    lines.append((f"step {data['step']}" if data["step"] else "model", final, "#2a5caa", "-", 0.18))
    largest = max(
        [values[name] for _, values, *_ in lines for name in ABILITIES if values[name] is not None], default=1
    )
    rim = math.ceil(5 * max(largest, 0.01)) / 5
    figure = Figure(figsize=(6.4, 6.4), layout="constrained")
    axes = figure.add_subplot(projection="polar")
    assert isinstance(axes, PolarAxes)
    axes.set_theta_offset(np.pi / 2)
    axes.set_theta_direction(-1)
    angles = np.linspace(0, 2 * np.pi, len(ABILITIES), endpoint=False)
    around = np.append(angles, angles[0])
    for label, values, colour, style, alpha in lines:
        own = [values[name] for name in ABILITIES]
        radii = np.array([np.nan if value is None else value for value in (*own, own[0])])
        axes.plot(around, radii, style, color=colour, linewidth=2, label=label, marker="o", markersize=3.5)
        axes.fill(around, np.nan_to_num(radii), color=colour, alpha=alpha, linewidth=0)
    axes.set_xticks(angles, [f"{name}\n{_number(final[name])}" for name in ABILITIES], fontsize=11)
    axes.tick_params(axis="x", pad=12)
    rings = [rim * part / 4 for part in (1, 2, 3, 4)]
    axes.set_ylim(0, rim)
    axes.set_yticks(rings, [f"{ring:.2g}" for ring in rings], fontsize=8, color="#777777")
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.spines["polar"].set_color("#bbbbbb")
    average = final["AVG-A"]
    figure.suptitle("UVRB abilities" + ("" if average is None else f", AVG-A {average:.3f}"), fontsize=13)
    axes.legend(loc="upper left", bbox_to_anchor=(-0.12, 1.12), frameon=False, fontsize=9)
    return figure
