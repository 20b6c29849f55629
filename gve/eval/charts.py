"""Charts of reports as matplotlib figures, and figures as inline SVG.

Colours are those of Okabe and Ito, which all readers can tell apart; lines also differ by marker and dash, so that a
black-and-white print can be read.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.projections.polar import PolarAxes
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":")
INK, FRAME, GRID = "#222222", "#bbbbbb", "#dddddd"
CELL_IN = 0.335  # side of a heat map's cell, in inches: three maps of ten columns fit beside each other
LUMINANCE = np.array([0.2126, 0.7152, 0.0722])


@dataclass(frozen=True)
class Line:
    """One series of a radar.

    Args:
        label: in the legend.
        values: axis -> score; None is a gap.
        colour, style: of matplotlib.
        fill: opacity of its area, 0 for none.
        marker: at each value.
    """

    label: str
    values: Mapping[str, float | None]
    colour: str
    style: str = "-"
    fill: float = 0.0
    marker: str = "o"


def colour_of(place: int) -> tuple[str, str, str]:
    """(colour, dash, marker) of the series at a place; 32 differ."""
    return COLOURS[place % len(COLOURS)], DASHES[place // len(COLOURS) % len(DASHES)], MARKERS[place % len(MARKERS)]


def draw_radar(lines: Sequence[Line], axis_labels: Mapping[str, str], title: str = "") -> Figure:
    """Scores on one axis per name. A missing value is a gap in its line.

    The rim is the next fifth above the largest value, so that small scores can be told apart.

    Args:
        lines: drawn in this order, the last on top.
        axis_labels: name of an axis -> what is written at it, clockwise from the top.
    """
    names = list(axis_labels)
    known = [value for line in lines for name in names if (value := line.values[name]) is not None]
    rim = math.ceil(5 * max([*known, 0.01])) / 5
    figure = Figure(figsize=(6.4, 6.6), layout="constrained")
    axes = figure.add_subplot(projection="polar")
    assert isinstance(axes, PolarAxes)
    axes.set_theta_offset(np.pi / 2)
    axes.set_theta_direction(-1)
    angles = np.linspace(0, 2 * np.pi, len(names), endpoint=False)
    around = np.append(angles, angles[0])
    for line in lines:
        own = [line.values[name] for name in names]
        radii = np.array([np.nan if value is None else value for value in (*own, own[0])])
        axes.plot(
            around,
            radii,
            line.style,
            color=line.colour,
            linewidth=2,
            label=line.label,
            marker=line.marker,
            markersize=4.5 if line.marker != "o" else 3.5,
        )
        if line.fill and not np.isnan(radii).any():
            axes.fill(around, radii, color=line.colour, alpha=line.fill, linewidth=0)
    axes.set_xticks(angles, list(axis_labels.values()), fontsize=11)
    axes.tick_params(axis="x", pad=12)
    rings = [rim * part / 4 for part in (1, 2, 3, 4)]
    axes.set_ylim(0, rim)
    axes.set_yticks(rings, [f"{ring:.2g}" for ring in rings], fontsize=8, color="#777777")
    axes.grid(color=GRID, linewidth=0.8)
    axes.spines["polar"].set_color(FRAME)
    if title:
        figure.suptitle(title, fontsize=13)
    figure.legend(loc="outside lower center", ncols=min(3, len(lines)), frameon=False, fontsize=9)
    return figure


def draw_heat_map(
    rows: Sequence[str], columns: Sequence[str], values: np.ndarray, doubtful: np.ndarray, title: str = ""
) -> Figure:
    """Correlations in colour and number; orange below 0, purple above, pale italics where the interval holds 0.

    Args:
        rows, columns: names along the sides.
        values: [rows, columns] in [-1, 1].
        doubtful: [rows, columns] bool.
    """
    figure = Figure(figsize=(0.65 + CELL_IN * len(columns), 0.75 + CELL_IN * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    colours = matplotlib.colormaps["PuOr"](Normalize(-1.0, 1.0)(values))[..., :3]
    colours[doubtful] = 1 - 0.3 * (1 - colours[doubtful])
    axes.imshow(colours, aspect="equal")
    for (row, column), value in np.ndenumerate(values):
        dark = colours[row, column] @ LUMINANCE < 0.5
        axes.text(
            column,
            row,
            f"{value:.2f}".replace("-", "\N{MINUS SIGN}"),
            ha="center",
            va="center",
            fontsize=7.5,
            color="#ffffff" if dark else "#555555" if doubtful[row, column] else INK,
            style="italic" if doubtful[row, column] else "normal",
        )
    axes.set_xticks(range(len(columns)), list(columns), fontsize=8, rotation=90 if max(map(len, columns)) > 6 else 0)
    axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axes.tick_params(length=0, top=True, bottom=False, labeltop=True, labelbottom=False)
    axes.spines[:].set_color(FRAME)
    if title:
        axes.set_title(title, fontsize=10, pad=8)
    return figure


def draw_differences(rows: Sequence[tuple[str, float, tuple[float, float]]], axis_label: str) -> Figure:
    """A dot and its interval per row, against a line at 0; hollow where the interval holds 0.

    Args:
        rows: (name, difference, interval) from top to bottom.
        axis_label: what the difference is of.
    """
    figure = Figure(figsize=(6.2, 0.6 + 0.26 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for place, (_, value, (low, high)) in enumerate(rows):
        clear = low > 0 or high < 0
        colour = COLOURS[0] if value >= 0 else COLOURS[1]
        axes.plot([low, high], [place, place], color=colour, linewidth=1.8, solid_capstyle="butt")
        axes.plot([value], [place], "o", color=colour, markerfacecolor=colour if clear else "white", markersize=5.5)
    axes.axvline(0, color="#555555", linewidth=1)
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="x", labelsize=9)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:+.2f}"))
    axes.set_xlabel(axis_label, fontsize=9)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FRAME)
    return figure


def draw_curves(panels: Mapping[str, Mapping[str, Sequence[tuple[float, float, float, float]]]], label: str) -> Figure:
    """Small multiples: score against a setting on a logarithmic axis, with its interval as a band.

    Args:
        panels: title -> series -> points (setting, score, low, high) by rising setting.
        label: of the setting.
    """
    across = min(4, len(panels))
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=(2.75 * across, 2.05 * down + 0.5), layout="constrained")
    series = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    handles: dict[str, Any] = {}
    for number, (title, lines) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(down, across, number)
        places = sorted({point[0] for points in lines.values() for point in points})
        for name, points in lines.items():
            colour, dash, marker = colour_of(series.index(name))
            setting, score, low, high = np.array(points).T
            (handles[name],) = axes.plot(setting, score, dash, color=colour, marker=marker, markersize=4, linewidth=1.6)
            axes.fill_between(setting, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(places))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        _frame(axes, title)
    return _labelled(figure, label, handles)


def draw_bands(panels: Mapping[str, Mapping[str, Any]], label: str = "step", across: int = 2) -> Figure:
    """Small multiples: a mean over steps, with one standard deviation on either side as a band.

    Args:
        panels: title -> series -> (steps, means, deviations), such as gve.eval.curves.Band.
        label: of the horizontal axis.
        across: panels of a row.
    """
    across = min(across, len(panels))
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=(3.7 * across, 2.3 * down + 0.4), layout="constrained")
    series = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    handles: dict[str, Any] = {}
    for number, (title, lines) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(down, across, number)
        for name, (steps, mean, deviation) in lines.items():
            colour, dash, _ = colour_of(series.index(name))
            (handles[name],) = axes.plot(steps, mean, dash, color=colour, linewidth=1.6)
            axes.fill_between(steps, mean - deviation, mean + deviation, color=colour, alpha=0.18, linewidth=0)
        _frame(axes, title)
    return _labelled(figure, label, handles)


def _frame(axes: Axes, title: str) -> None:
    """One panel of small multiples."""
    axes.set_title(title, fontsize=10)
    axes.tick_params(labelsize=8)
    axes.grid(color=GRID, linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(FRAME)


def _labelled(figure: Figure, label: str, handles: Mapping[str, Any]) -> Figure:
    """Small multiples with the label of their horizontal axes, and a legend where there are several series."""
    figure.supxlabel(label, fontsize=9)
    if len(handles) > 1:
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    return figure


def to_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as one SVG element for a page.

    Text stays text (searchable, in the page's font); ids are made unique by `name`, since several charts share a page;
    equal figures give equal text.

    Args:
        name: of letters, digits and hyphens, unique on the page.
        description: what a screen reader says.
    """
    draft = io.StringIO()
    font = {"font.family": "sans-serif", "font.sans-serif": ["Liberation Sans", "Arial", "Helvetica", "DejaVu Sans"]}
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, **font}):
        figure.savefig(draft, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    svg = draft.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    width, height = (72 * size for size in figure.get_size_inches())
    head = f'<svg class="chart" role="img" aria-label="{html.escape(description)}" style="width:{width:.0f}pt;'
    head += f'max-width:100%;height:auto" viewBox="0 0 {width:.6g} {height:.6g}"'
    head += ' xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
    return head + svg[svg.index(">") + 1 :].rstrip()
