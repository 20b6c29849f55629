"""Charts of an audit; colours and inline SVG are those of gve.eval.charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter, StrMethodFormatter

from gve.eval.charts import COLOURS, FRAME, GRID

BLUE, ORANGE, GREEN = COLOURS[:3]
ASKED = "#555555"
BARS = 30


def _axes(width: float, height: float, names: Sequence[str]) -> tuple[Figure, Axes]:
    """Horizontal rows from top to bottom."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_yticks(range(len(names)), list(names), fontsize=9)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)
    _plain(axes)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    return figure, axes


def _plain(axes: Axes) -> None:
    axes.tick_params(axis="x", labelsize=8.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FRAME)


def draw_funnel(steps: Sequence[Mapping[str, Any]]) -> Figure:
    """Rows that went on (solid) and that were rejected (hatched) in each step, with the numbers."""
    figure, axes = _axes(7.2, 0.5 + 0.36 * len(steps), [step["step"] for step in steps])
    most = max((step["in"] for step in steps), default=1)
    for place, step in enumerate(steps):
        lost = step["in"] - step["out"]
        axes.barh(place, step["out"], color=BLUE, height=0.62)
        if lost:
            axes.barh(place, lost, left=step["out"], color="#ffffff", edgecolor=ORANGE, hatch="////", height=0.62)
        told = f"{step['out']:,}" + (f" + {lost:,} rejected" if lost else "")
        axes.text(step["in"] + most * 0.012, place, told, va="center", fontsize=8.5)
    axes.set_xlim(0, most * 1.3)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel("rows", fontsize=9)
    return figure


def draw_shares(shares: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Share of each name with its interval, and a mark where it was asked to be."""
    figure, axes = _axes(5.2, 0.95 + 0.34 * len(shares), list(shares))
    for place, row in enumerate(shares.values()):
        low, high = row["interval"]
        axes.barh(place, row["share"], color=BLUE, alpha=0.85, height=0.56)
        axes.plot([low, high], [place, place], color="#000000", linewidth=1.4, solid_capstyle="butt")
        _mark(axes, row["asked"], place)
    _legend(axes)
    axes.set_xlim(0, None)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("share of the videos", fontsize=9)
    return figure


def draw_tasks(tasks: Mapping[str, Mapping[str, int]]) -> Figure:
    """Pairs made of each task, and a mark at what was asked for."""
    most = max((max(row["made"], row["asked"]) for row in tasks.values()), default=1) or 1
    figure, axes = _axes(5.2, 0.95 + 0.34 * len(tasks), list(tasks))
    for place, row in enumerate(tasks.values()):
        axes.barh(place, row["made"], color=BLUE, alpha=0.85, height=0.56)
        _mark(axes, row["asked"], place)
        axes.text(max(row["made"], row["asked"]) + 0.02 * most, place, f"{row['made']:,}", va="center", fontsize=8.5)
    _legend(axes)
    axes.set_xlim(0, 1.15 * most)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel("pairs", fontsize=9)
    return figure


def _mark(axes: Axes, value: float, place: int) -> None:
    axes.plot([value, value], [place - 0.4, place + 0.4], color=ORANGE, linewidth=2.4, solid_capstyle="butt")


def _legend(axes: Axes) -> None:
    axes.plot([], [], color=ORANGE, linewidth=2.4, label="asked for")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=8.5, borderaxespad=0)


def draw_lengths(styles: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Histograms of words by style on one scale; the range that was asked for is shaded."""
    figure = Figure(figsize=(7.2, 0.45 + 0.78 * len(styles)), layout="constrained")
    most = 1.03 * max(row["most"] for row in styles.values())
    edges = np.linspace(0, most, min(BARS, max(2, int(most))) + 1)
    rows = figure.subplots(len(styles), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (style, row) in zip(rows, styles.items(), strict=True):
        low, high = row["asked"]
        axes.axvspan(low, min(high, most), color=GREEN, alpha=0.16, linewidth=0)
        axes.hist(list(map(int, row["words"])), edges, weights=list(row["words"].values()), color=BLUE)
        axes.set_yticks([])
        axes.set_ylabel(style.replace(" ", "\n", 1), rotation=0, ha="right", va="center", fontsize=9)
        _plain(axes)
    rows[-1].set_xlim(0, most)
    rows[-1].set_xlabel("words (shaded: what was asked for)", fontsize=9)
    return figure


def draw_cues(cues: Mapping[str, Mapping[str, float]]) -> Figure:
    """Mean shares of spatial, temporal and theme words by profile, end to end."""
    figure, axes = _axes(5.2, 0.85 + 0.34 * len(cues), list(cues))
    kinds = list(next(iter(cues.values())))
    for place, row in enumerate(cues.values()):
        left = 0.0
        for kind, colour, hatch in zip(kinds, (BLUE, COLOURS[4], "#bbbbbb"), ("", "", "...."), strict=True):
            axes.barh(place, row[kind], left=left, color=colour, hatch=hatch, edgecolor="#ffffff", height=0.56)
            if row[kind] > 0.06:
                dark = colour == BLUE
                axes.text(
                    left + row[kind] / 2,
                    place,
                    f"{row[kind]:.0%}",
                    ha="center",
                    va="center",
                    fontsize=8.5,
                    color="#ffffff" if dark else "#000000",
                )
            left += row[kind]
    for kind, colour in zip(kinds, (BLUE, COLOURS[4], "#bbbbbb"), strict=True):
        axes.barh([0], [0], color=colour, label=f"{kind} words")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=8.5, borderaxespad=0)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return figure


def draw_rates(rates: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Rate of false claims with its interval, a dot a row."""
    known = {name: row for name, row in rates.items() if row["value"] is not None}
    figure, axes = _axes(5.6, 0.65 + 0.3 * len(known), list(known))
    for place, row in enumerate(known.values()):
        axes.plot([row["low"], row["high"]], [place, place], color=ORANGE, linewidth=2, solid_capstyle="butt")
        axes.plot([row["value"]], [place], "o", color=ORANGE, markersize=6, clip_on=False)
    axes.set_xlim(0, min(1.0, 1.1 * max((row["high"] for row in known.values()), default=1.0)))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("false claims", fontsize=9)
    return figure
