"""Makes table.md from results.csv: the arms on nine abilities, and what paired seeds say of them.

    python experiments/0005-ablation/verdict.py [RESULTS.csv]

Needs no GPU and no run folder. Nothing is chosen here: arms, comparisons and the family of tests are fixed below.
"""

from __future__ import annotations

import sys
from pathlib import Path

from gve.eval.uvrb import ABILITIES, AVERAGES
from gve.sweep.collect import read_table
from gve.sweep.paired import Effect, adjusted, compare, mean_interval, scores_of

METRICS = (*AVERAGES, *ABILITIES)
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
    scores = {metric: scores_of(rows, metric) for metric in METRICS}
    arms = list(scores[PRIMARY])
    seeds = {arm: len(scores[PRIMARY][arm]) for arm in arms}
    undone = [row for row in rows if not row.done]
    lines = ["# Arms", "", "Mean over paired seeds; below it the 95% interval over seeds (Student's t).", ""]
    lines += ["| arm | seeds | " + " | ".join(METRICS) + " |", "|---|---:|" + "---:|" * len(METRICS)]
    for arm in arms:
        cells = []
        for metric in METRICS:
            mean, low, high = mean_interval(list(scores[metric][arm].values()))
            cells.append(f"{mean:.3f}<br>{low:.3f} to {high:.3f}" if seeds[arm] > 1 else f"{mean:.3f}")
        lines.append(f"| {arm} | {seeds[arm]} | " + " | ".join(cells) + " |")
    lines += ["", "# Comparisons", ""]
    lines += [
        f"Differences paired by seed. {PRIMARY} is the primary score: its p-values are adjusted by Holm over the "
        f"{len(COMPARISONS)} comparisons. Abilities are secondary, adjusted over all comparisons and abilities. "
        "Detectable is the least true difference that this many seeds find in 80% of the cases at the 5% level, before "
        "adjustment: a smaller effect may exist and stay unseen.",
        "",
        "| comparison | score | difference | 95% interval | p, adjusted | detectable | verdict |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    known = [pair for pair in COMPARISONS if all(seeds.get(arm, 0) > 1 for arm in pair)]
    effects = {
        (f"{one} - {other}", metric): compare(scores[metric], one, other)
        for one, other in known
        for metric in (PRIMARY, *ABILITIES)
    }
    for family in ((PRIMARY,), ABILITIES):
        own = {f"{name}|{metric}": effect for (name, metric), effect in effects.items() if metric in family}
        values = adjusted(own)
        for key, effect in own.items():
            name, metric = key.split("|")
            lines.append(_line(name, metric, effect, values[key]))
    lines += ["", *(f"- {one} - {other}: {why}" for (one, other), why in COMPARISONS.items())]
    if undone:
        lines += ["", f"Not done: {', '.join(row.facts['run'] for row in undone)}."]
    return "\n".join(lines) + "\n"


def _line(name: str, metric: str, effect: Effect, p: float) -> str:
    low, high = effect.interval
    verdict = "no detectable effect" if p > 0.05 else "higher" if effect.value > 0 else "lower"
    return (
        f"| {name} | {metric} | {effect.value:+.3f} | {low:+.3f} to {high:+.3f} | {p:.3f} | {effect.detectable:.3f} | "
        f"{verdict} |"
    )


if __name__ == "__main__":
    here = Path(__file__).parent
    text = report(Path(sys.argv[1]) if len(sys.argv) > 1 else here / "results.csv")
    (here / "table.md").write_text(text)
    print(text, end="")
