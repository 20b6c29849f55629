"""Makes table.md from results.csv: y = a ln x + b for every score, x the pairs that a run trains on.

python experiments/0007-data-scaling/fit.py [RESULTS.csv]
"""

from __future__ import annotations

import sys
from pathlib import Path

from gve.eval.uvrb import ABILITIES, AVERAGES
from gve.sweep.collect import read_table
from gve.sweep.paired import mean_interval, scores_of
from gve.sweep.scaling import log_fit


def report(results: Path) -> str:
    """The content of table.md."""
    rows = [row for row in read_table(results) if row.done]
    size = {row.cell: float(row.facts["x"]) for row in rows if row.facts["x"]}
    apart = [cell for cell in dict.fromkeys(row.cell for row in rows) if cell not in size]
    lines = [
        "Mean over seeds at each size; what ten times the pairs add by y = a ln x + b through all runs, with the 95% "
        "interval of the slope (Student's t on the scatter of the runs around the line).",
        "",
        "| score | "
        + " | ".join([*(f"{x:,.0f} pairs" for x in size.values()), *apart])
        + " | per tenfold | interval | R2 |",
        "|---|" + "---:|" * (len(size) + len(apart) + 3),
    ]
    for metric in (*AVERAGES, *ABILITIES):
        scores = scores_of(rows, metric)
        points = [(x, score) for cell, x in size.items() for score in scores.get(cell, {}).values()]
        if len({x for x, _ in points}) < 2:
            continue
        fit = log_fit(*zip(*points, strict=True))
        low, high = fit.per_tenfold_interval
        cells = [
            f"{mean_interval(list(scores[cell].values()))[0]:.3f}" if cell in scores else "-"
            for cell in [*size, *apart]
        ]
        lines.append(
            f"| {metric} | {' | '.join(cells)} | {fit.per_tenfold:+.3f} | {low:+.3f} to {high:+.3f} | {fit.r2:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    here = Path(__file__).parent
    text = report(Path(sys.argv[1]) if len(sys.argv) > 1 else here / "results.csv")
    (here / "table.md").write_text(text)
    print(text, end="")
