"""Makes table.md from results.csv: the arms on nine abilities, and what paired seeds say of them.

    python experiments/0005-ablation/verdict.py [RESULTS.csv]

Needs no GPU and no run folder. Arms, comparisons and families of tests are fixed here, before the first run.
"""

from __future__ import annotations

import sys
from pathlib import Path

from gve.eval.uvrb import ABILITIES, AVERAGES
from gve.sweep.collect import read_table
from gve.sweep.tables import arm_lines, comparison_lines, undone

PRIMARY = "AVG-A"
COMPARISONS = {
    ("gve_s", "gve_i"): "is there a gain from the pairs of four more tasks? (data presence)",
    ("gve", "gve_s"): "the paper's step from GVE-s to GVE: curriculum and shares together",
    ("gve", "uniform"): "the pyramid against equal shares of the same units",
    ("gve_s", "uniform"): "shares by size against equal shares",
    ("easy_first", "uniform"): "easy first: order alone, each unit as often as under uniform",
    ("hard_first", "uniform"): "hard first: order alone",
    ("easy_first", "hard_first"): "easy first against hard first",
}


def report(results: Path) -> str:
    """The content of table.md."""
    rows = read_table(results)
    lines = ["# Arms", "", "Mean over paired seeds; below it the 95% interval over seeds (Student's t).", ""]
    lines += arm_lines(rows, (*AVERAGES, *ABILITIES))
    lines += ["", "# Comparisons", ""]
    lines += [
        f"Differences paired by seed. {PRIMARY} is the primary score: its p-values are adjusted by Holm over the "
        f"{len(COMPARISONS)} comparisons. Abilities are secondary, adjusted over all comparisons and abilities. "
        "Detectable is the least true difference that this many seeds find in 80% of the cases at the 5% level, before "
        "adjustment: a smaller effect may exist and stay unseen.",
        "",
        *comparison_lines(rows, list(COMPARISONS), ((PRIMARY,), ABILITIES)),
        "",
        *(f"- {one} - {other}: {why}" for (one, other), why in COMPARISONS.items()),
    ]
    if left := undone(rows):
        lines += ["", "Without a result:", *(f"- {name}: {reason}" for name, reason in left.items())]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    here = Path(__file__).parent
    text = report(Path(sys.argv[1]) if len(sys.argv) > 1 else here / "results.csv")
    (here / "table.md").write_text(text)
    print(text, end="")
