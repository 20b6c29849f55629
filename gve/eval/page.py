"""The report as one HTML page that needs nothing but itself: no network, no other file."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

import gve
from gve.eval.cells import cell_table, read_cells
from gve.eval.charts import COLOURS, Line, colour_of, draw_curves, draw_differences, draw_heat_map, draw_radar, to_svg
from gve.eval.comparison import Comparison, compare, run_labels
from gve.eval.gallery import Thumbnails, make_gallery
from gve.eval.mteb_results import read_mteb_results
from gve.eval.published import (
    CORRELATIONS,
    MODEL_TYPES,
    WRONG_QUOTATIONS,
    correlation_matrix,
    families,
    models_of,
    other_sizes,
    published_scores,
    recomputed_scores,
    slips,
    table_columns,
)
from gve.eval.report import result_notes, result_warnings
from gve.eval.results import SavedResults, write_whole
from gve.eval.statistics import correlation_interval
from gve.eval.uvrb import ABILITIES, AVERAGES, SETS
from gve.items import InputError

RADAR_RUNS = 6  # more lines hide each other


@dataclass(frozen=True)
class PageOptions:
    """What the page shows.

    Args:
        root: folder of the sets; None takes the one that each run names.
        gallery: best and worst queries shown of each set; 0 for none.
        top: results shown of each query, at most 10.
        num_workers: threads that wait for the decoders of thumbnails.
        resamples: bootstrap replicates.
        mteb: result files of MTEB, or their folders, for a table of their own.
    """

    root: str | None = None
    gallery: int = 3
    top: int = 5
    num_workers: int = 2
    resamples: int = 10000
    mteb: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class _Run:
    """A run as the page sees it."""

    label: str
    saved: SavedResults

    @property
    def data(self) -> Mapping[str, Any]:
        return self.saved.data

    @property
    def other_sizes(self) -> list[str]:
        return other_sizes(self.data["sets"])

    @property
    def genuine(self) -> bool:
        """Whether it may stand beside published scores: it has sets of UVRB, and none is a stand-in."""
        known = {record.name for record in SETS}
        return not self.other_sizes and any(name in known for name in self.data["sets"])

    @property
    def rows(self) -> dict[str, Mapping[str, Any]]:
        """Rows of sets. Ranking the whole corpus of a set with pools is a row of its own, not mixed with the pools'."""
        rows = dict(self.data["sets"])
        whole = {name: row["whole_corpus"] for name, row in rows.items() if "whole_corpus" in row}
        return rows | {f"{name} (whole corpus)": row for name, row in whole.items()}

    def value(self, name: str) -> float | None:
        if name in self.data["abilities"]:
            return self.data["abilities"][name]
        return self.rows.get(name, {}).get("value")

    def bounds(self, name: str) -> Sequence[float] | None:
        if name in self.data["abilities"]:
            return self.data["ability_intervals"][name]
        return self.rows.get(name, {}).get("interval")

    def to_dict(self) -> dict[str, Any]:
        data = self.data
        return {
            "label": self.label,
            "folder": str(self.saved.folder),
            "model": data.get("model", ""),
            "setting": data.get("setting", {}),
            "weights": data["weights"],
            "step": data["step"],
            "protocol": data["protocol"]["hash"],
            "comparable_with_published": self.genuine,
            "other_sizes": self.other_sizes,
            "warnings": result_warnings(data),
            "notes": result_notes(data),
            **{key: data[key] for key in ("abilities", "ability_intervals", "sets")},
        }


def _runs(saved: Sequence[SavedResults]) -> list[_Run]:
    return [_Run(label, run) for label, run in zip(run_labels(saved), saved, strict=True)]


def _comparisons(runs: Sequence[_Run], resamples: int) -> tuple[list[Comparison], list[str]]:
    """Every run minus the first, and why some cannot be compared."""
    found, refused = [], []
    for run in runs[1:]:
        try:
            labels = (runs[0].label, run.label)
            found.append(compare(runs[0].saved, run.saved, labels, across_settings=True, resamples=resamples))
        except InputError as error:
            refused.append(str(error))
    return found, refused


def page_data(saved: Sequence[SavedResults], resamples: int = 10000) -> dict[str, Any]:
    """What the page says of the runs, as plain values.

    Args:
        saved: the runs; the first is the baseline.
        resamples: bootstrap replicates of the comparisons.
    """
    runs = _runs(saved)
    comparisons, refused = _comparisons(runs, resamples)
    return {
        "version": gve.__version__,
        "runs": [run.to_dict() for run in runs],
        "comparisons": [comparison.to_dict() for comparison in comparisons],
        "not_compared": refused,
        "scaling": [curve.to_dict() for curve in scaling_curves(runs)],
    }


@dataclass(frozen=True, eq=False)
class Curve:
    """One model under several values of one setting, all other settings equal.

    Args:
        series: model and the settings that are held.
        setting: what varies, for example "frames".
        runs: value of the setting -> run, rising.
    """

    series: str
    setting: str
    runs: Mapping[float, Any]

    def points(self, name: str) -> list[tuple[float, float, float, float]]:
        """(setting, score, low, high) of a set or ability, where it is known."""
        points = []
        for setting, run in self.runs.items():
            value, bounds = run.value(name), run.bounds(name)
            if value is not None and bounds is not None:
                points.append((setting, value, bounds[0], bounds[1]))
        return points

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        names = table_columns()
        return {
            "series": self.series,
            "setting": self.setting,
            "points": {name: points for name in names if (points := self.points(name))},
        }


def scaling_curves(runs: Sequence[_Run]) -> list[Curve]:
    """Test-time scaling: runs of the same weights that differ in one number of their settings."""
    curves = []
    weights: dict[str, list[_Run]] = {}
    for run in runs:
        weights.setdefault(run.data["weights"] or run.label, []).append(run)
    for own in weights.values():
        settings = [_numbers(run) for run in own]
        keys = list(dict.fromkeys(key for s in settings for key in s))
        varying = [key for key in keys if len({numbers.get(key) for numbers in settings}) > 1]
        for key in varying:
            groups: dict[str, dict[float, _Run]] = {}
            for run, numbers in zip(own, settings, strict=True):
                rest = {name: value for name, value in run.data.get("setting", {}).items() if name != key}
                if key in numbers:
                    groups.setdefault(json.dumps(rest, sort_keys=True), {})[numbers[key]] = run
            wide = {rest: group for rest, group in groups.items() if len(group) > 1}
            for group in wide.values():
                first = next(iter(group.values()))
                held = [
                    f"{name} {value:g}" for name, value in _numbers(first).items() if name != key and name in varying
                ]
                name = ", ".join([str(first.data.get("model") or first.label), *held])
                curves.append(Curve(name, key, dict(sorted(group.items()))))
    return curves


def _numbers(run: _Run) -> dict[str, float]:
    """Settings that are positive numbers."""
    setting = run.data.get("setting", {})
    return {
        key: float(value)
        for key, value in setting.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
    }


def write_page(path: Path, saved: Sequence[SavedResults], options: PageOptions, *, progress: bool = True) -> None:
    """Writes the page, whole or not at all.

    Args:
        path: of the page; other files stand nowhere.
        saved: the runs, the first the baseline; none for the published models alone.
        progress: show a bar while thumbnails are decoded.
    """
    runs = _runs(saved)
    thumbnails = Thumbnails(options.num_workers)
    galleries = []
    if options.gallery:
        for run in _first_settings(runs):
            if run.saved.sets:
                root = options.root or run.saved.run.get("root")
                shown = make_gallery(run.saved, root, thumbnails, count=options.gallery, top=options.top)
                galleries.append({"label": run.label, "sets": shown})
        thumbnails.decode("thumbnails" if progress else "")
    comparisons, refused = _comparisons(runs, options.resamples)
    genuine = [run for run in runs if run.genuine]
    stand_ins = [run for run in runs if not run.genuine]
    content = {
        "version": gve.__version__,
        "runs": [_run_view(run) for run in runs],
        "stand_ins": [{"label": run.label, "sets": run.other_sizes} for run in stand_ins],
        "tables": [*_score_tables(stand_ins, published=False), *_score_tables(genuine, published=True)],
        "radar": _radar(runs, published=not stand_ins),
        "comparisons": [_comparison_view(number, each) for number, each in enumerate(comparisons)],
        "not_compared": refused,
        "scaling": _scaling_charts(runs),
        "ablations": [_ablation_view(run) for run in runs if read_cells(run.saved.folder)],
        "correlations": _correlation_view(),
        "slips": [*map(str, slips()), *map(str, WRONG_QUOTATIONS)],
        "mteb": read_mteb_results(options.mteb),
        "galleries": galleries,
        "thumbnails": thumbnails,
        "resamples": options.resamples,
    }
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(resources.files("gve.eval").joinpath("page.html.j2").read_text())
    write_whole(path, template.render(content).encode())


def _first_settings(runs: Sequence[_Run]) -> list[_Run]:
    """One run of each model: its other settings would show nearly the same queries."""
    first: dict[str, _Run] = {}
    for run in runs:
        first.setdefault(run.data["weights"] or run.label, run)
    return list(first.values())


def _run_view(run: _Run) -> dict[str, Any]:
    """What the page says of a run beside its scores."""
    made = run.saved.run
    hardware = made.get("hardware") or {}
    seconds = made.get("seconds") or {}
    facts = {
        "model": run.data.get("model") or "-",
        "setting": ", ".join(f"{key} {value}" for key, value in run.data.get("setting", {}).items()),
        "training steps": run.data["step"],
        "weights": run.data["weights"][:16],
        "protocol": run.data["protocol"]["hash"],
        "gve": run.data.get("version"),
        "folder": run.saved.folder,
        "root of the sets": made.get("root"),
        "hardware": ", ".join(f"{key} {value}" for key, value in hardware.items()) if hardware else None,
        "seconds": seconds.get(run.saved.folder.name) if isinstance(seconds, dict) else seconds,
    }
    return {
        "label": run.label,
        "facts": {key: value for key, value in facts.items() if value},
        "warnings": result_warnings(run.data),
        "notes": result_notes(run.data),
    }


def _score_tables(runs: Sequence[_Run], *, published: bool) -> list[dict[str, Any]]:
    """A table of abilities and one of sets; the published models in them or not."""
    if not runs and not published:
        return []
    known = [record.name for record in SETS]
    others = sorted({name for run in runs for name in run.rows} - set(known))
    tables = [
        _score_table("Abilities", [*AVERAGES, *ABILITIES], runs, published=published),
        _score_table("Sets", known, runs, published=published),
    ]
    if others:
        tables.append(_score_table("Other sets", others, runs, published=False))
    if not published:
        for table in tables:
            table["title"] += " of runs that are not comparable with published scores"
    elif not runs:
        for table in tables:
            table["title"] += " of the published models"
    return tables


def _score_table(title: str, names: Sequence[str], runs: Sequence[_Run], *, published: bool) -> dict[str, Any]:
    kinds = {"clip": "CLIP-type", "mllm": "MLLM-type"}
    rows: list[dict[str, Any]] = []
    for run in runs:
        rows.append(
            {"label": run.label, "kind": "this report", "own": True, "cells": [_own_cell(run, name) for name in names]}
        )
    for model, family in families().items() if published else ():
        values = published_scores()[model] | recomputed_scores()[model]
        printed = [{"value": values[name], "interval": None, "mark": ""} for name in names]
        rows.append({"label": model, "kind": kinds[family], "own": False, "cells": printed})
    for column in zip(*(row["cells"] for row in rows), strict=True):
        best = max((cell["value"] or 0.0 for cell in column if not cell["mark"]), default=0.0)
        for cell in column:
            cell["best"] = len(rows) > 1 and not cell["mark"] and cell["value"] == best > 0
    return {"title": title, "columns": names, "rows": rows, "types": published}


def _own_cell(run: _Run, name: str) -> dict[str, Any]:
    row = run.rows.get(name)
    incomplete = row is not None and not row["complete"]
    return {
        "value": run.value(name),
        "interval": run.bounds(name) if run.value(name) is not None else None,
        "mark": "incomplete" if incomplete else "",
    }


def _radar(runs: Sequence[_Run], *, published: bool) -> Markup:
    """The first runs, and beside runs of the benchmark itself the best published model of each type and GVE-7B."""
    lines = []
    if published:
        scores = recomputed_scores()
        best = [max(models_of(kind), key=lambda m: scores[m]["AVG-A"]) for kind in ("CLIP-type", "MLLM-type")]
        others = [max((m for m in models_of("MLLM-type") if not m.startswith("GVE")), key=lambda m: scores[m]["AVG-A"])]
        greys = ("#7a7a7a", "#a0a0a0", "#555555")
        for place, model in enumerate(dict.fromkeys([best[0], *others, best[1]])):
            style = (":", "-.", "--")[place]
            colour = greys[place] if runs else COLOURS[place]
            lines.append(Line(f"{model} (paper)", scores[model], colour, style if runs else "-", 0.0 if runs else 0.06))
    for place, run in enumerate(runs[:RADAR_RUNS]):
        colour, style, marker = colour_of(place)
        lines.append(Line(run.label, run.data["abilities"], colour, style, 0.08, marker))
    if runs and not published:
        lines.insert(0, Line("chance", runs[0].data["ability_chance"], "#8c8c8c", ":"))
    figure = draw_radar(lines, {name: name for name in ABILITIES})
    return Markup(to_svg(figure, "radar", "Radar of the nine abilities: " + ", ".join(line.label for line in lines)))


def _comparison_view(number: int, comparison: Comparison) -> dict[str, Any]:
    rows = [(name, row["difference"], tuple(row["interval"])) for name, row in comparison.sets.items()]
    above = [(name, row["difference"], tuple(row["interval"])) for name, row in comparison.abilities.items()]
    title = f"{comparison.model} minus {comparison.baseline}"
    figure = draw_differences([*above, *rows], "difference of scores")
    return {**comparison.to_dict(), "title": title, "chart": Markup(to_svg(figure, f"difference-{number}", title))}


def _scaling_charts(runs: Sequence[_Run]) -> list[dict[str, Any]]:
    curves = scaling_curves(runs)
    charts: list[dict[str, Any]] = []
    for setting in dict.fromkeys(curve.setting for curve in curves):
        own = [curve for curve in curves if curve.setting == setting]
        names = [n for n in (*AVERAGES, *ABILITIES) if any(curve.points(n) for curve in own)]
        names = names or [n for n in table_columns() if any(curve.points(n) for curve in own)]
        panels = {name: {curve.series: curve.points(name) for curve in own if curve.points(name)} for name in names}
        if panels:
            svg = to_svg(draw_curves(panels, setting), f"scaling-{len(charts)}", f"Scores against {setting}")
            charts.append({"setting": setting, "chart": Markup(svg)})
    return charts


def _ablation_view(run: _Run) -> dict[str, Any]:
    cells = read_cells(run.saved.folder)
    tables = [cell_table(cells, scope) for scope in ("ability", "set")]
    return {"label": run.label, "tables": [{"head": head, "rows": rows} for head, rows in tables if len(head) > 1]}


def _correlation_view() -> dict[str, Any]:
    """Heat maps over the three sets of models, all pairs with intervals, and the paper's claims."""
    names = ["AVG-A", *ABILITIES]
    maps, pairs = [], []
    matrices = {kind: correlation_matrix(names, kind) for kind in MODEL_TYPES}
    for kind, matrix in matrices.items():
        maps.append(_heat_map(kind, names, names, matrix))
    for row, column in itertools.combinations(range(len(names)), 2):
        cells = [(m[row, column], correlation_interval(m[row, column], len(models_of(k)))) for k, m in matrices.items()]
        pairs.append({"pair": (names[row], names[column]), "cells": cells})
    sets = [record.name for record in SETS]
    both = correlation_matrix([*names, *sets], "all")[: len(names), len(names) :]
    return {
        "maps": maps,
        "sets": _heat_map("all", names, sets, both),
        "pairs": pairs,
        "kinds": [(kind, len(models_of(kind)), ", ".join(models_of(kind))) for kind in MODEL_TYPES],
        "claims": [claim.to_dict() for claim in CORRELATIONS],
    }


def _heat_map(kind: str, rows: Sequence[str], columns: Sequence[str], matrix: np.ndarray) -> dict[str, Any]:
    count = len(models_of(kind))
    doubtful = np.array([[_holds_zero(value, count) for value in line] for line in matrix])
    title = f"{'all models' if kind == 'all' else kind} ({count})"
    svg = to_svg(
        draw_heat_map(rows, columns, matrix, doubtful, title),
        f"correlations-{kind}-{len(columns)}".lower(),
        f"Correlations of {', '.join(rows)} with {', '.join(columns)} over {title}",
    )
    return {"title": title, "chart": Markup(svg)}


def _holds_zero(value: float, count: int) -> bool:
    low, high = correlation_interval(value, count)
    return low <= 0 <= high
