"""What an evaluation leaves behind for people: report.md, radar.png, a terminal table; and all its files at once."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from gve.eval.cells import Cell, cell_table
from gve.eval.charts import Line, draw_radar
from gve.eval.published import other_sizes
from gve.eval.results import Results, write_json, write_positions, write_whole
from gve.eval.uvrb import ABILITIES, AVERAGES, SETS, published_scores

TIE_ALARM = 0.001  # optimistic minus pessimistic: above it, ties (a collapsed model?) carry the score
PUBLISHED_SHOWN = ("GVE-3B", "GVE-7B")


def write_report(folder: Path, results: Results, cells: Sequence[Cell] = ()) -> None:
    """Writes radar.png, uvrb_positions.npz, report.md and last uvrb.json, which says that the rest is there."""
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / "radar.tmp.png"
    radar(results.data).savefig(draft, dpi=160)
    os.replace(draft, folder / "radar.png")
    write_positions(folder, results)
    write_whole(folder / "report.md", report(results, cells).encode())
    write_json(folder / "uvrb.json", results)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _with_interval(value: float | None, bounds: Sequence[float] | None) -> str:
    return "-" if value is None or bounds is None else f"{value:.3f} [{bounds[0]:.3f}, {bounds[1]:.3f}]"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    right = "|".join(["---"] + ["---:"] * (len(head) - 1))
    return [f"| {' | '.join(head)} |", f"|{right}|", *(f"| {' | '.join(row)} |" for row in rows), ""]


def report(results: Results, cells: Sequence[Cell] = ()) -> str:
    """The text of report.md; `cells` are those of the ablations, if any were run."""
    data = results.data
    warnings = [*result_warnings(data), *result_notes(data)]
    lines = [
        "# UVRB report",
        "",
        f"gve {data['version']}, {data['step']} training steps, weights `{data['weights'][:12]}`, "
        f"protocol `{data['protocol']['hash']}`.",
        "",
        *[f"- {line}" for line in warnings],
        *[""] * bool(warnings),
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
        *_markdown(*_set_table(results, data)),
        *_ablation_section(results, data),
        *_cell_section(cells),
    ]
    return "\n".join(lines)


def result_warnings(data: Mapping[str, Any]) -> list[str]:
    """What a reader must know before a number, a sentence each: incomplete sets, ties, sets that are absent.

    Args:
        data: the content of a uvrb.json.
    """
    lines = []
    for label, part in (("", data), ("untrained: ", data.get("untrained", {"sets": {}}))):
        for name, row in part["sets"].items():
            if row["missing"]:
                lines.append(f"{label}{name} is incomplete: {len(row['missing'])} unread, {row['missing'][0]}")
            if not row["complete"]:
                lines.append(f"{label}{name} enters no average.")
            if row["optimistic"] - row["pessimistic"] > TIE_ALARM:
                lines.append(
                    f"{label}{name}: equal similarities decide {row['pessimistic']:.3f} to {row['optimistic']:.3f}."
                )
    absent = [record.name for record in SETS if record.name not in data["sets"]]
    if absent:
        lines.append(f"Not run: {', '.join(absent)}; averages that need them are left out.")
    return lines


def result_notes(data: Mapping[str, Any]) -> list[str]:
    """Where sets deviate from the paper's protocol, a sentence each; of the sets of a uvrb.json's `data`."""
    return [f"{name}: {note}." for name, row in data["sets"].items() for note in row["notes"]]


def _ability_table(results: Results, data: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    head = ["ability", "trained"] + (["untrained", "gain"] if results.untrained else []) + ["chance"]
    # Published rows stand beside a score of the same benchmark only, never beside a stand-in's.
    genuine = {record.name for record in SETS} <= set(data["sets"]) and not other_sizes(data["sets"])
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


def _set_table(results: Results, data: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    head = ["set", "queries", "corpus", "metric", "trained"]
    head += ["untrained", "p (Holm)"] if "untrained" in data else []
    rows = []
    for name, row in data["sets"].items():
        size = f"{row['n_corpus']}" if row["n_candidates"] == row["n_corpus"] else f"{row['n_candidates']} a query"
        line = [
            name,
            str(row["n_query"]),
            size,
            results.scores[name].tested.record.metric_label,
            _with_interval(row["value"], row["interval"]),
        ]
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


def _cell_section(cells: Sequence[Cell]) -> list[str]:
    """Each ability under every ablation, against the run itself; each set where no ability is whole."""
    if not cells:
        return []
    scope = "ability" if any(cell.scope == "ability" for cell in cells) else "set"
    head, rows = cell_table(cells, scope)
    return [
        "## Ablations",
        "",
        "The same weights under other conditions: score, then the difference from the plain run, paired by query, with "
        "its 95% interval; * where that leaves 0 out. All cells, sets too, stand in ablation.csv.",
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

    Args:
        data: the content of a uvrb.json.
    """
    final = data["abilities"]
    lines = [Line("chance", data["ability_chance"], "#8c8c8c", ":")]
    if "untrained" in data:
        lines.append(Line("untrained", data["untrained"]["abilities"], "#d1813b", "--", 0.08))
    lines.append(Line(f"step {data['step']}" if data["step"] else "model", final, "#2a5caa", "-", 0.18))
    average = final["AVG-A"]
    title = "UVRB abilities" + ("" if average is None else f", AVG-A {average:.3f}")
    return draw_radar(lines, {name: f"{name}\n{_number(final[name])}" for name in ABILITIES}, title)
