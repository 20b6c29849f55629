"""Tables of a sweep as Markdown: arms beside one another, and what paired seeds say of two of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gve.sweep.collect import Row
from gve.sweep.paired import Effect, adjusted, compare, mean_interval, scores_of

LEVEL = 0.05


def arm_lines(rows: Sequence[Row], metrics: Sequence[str], setting: str = "") -> list[str]:
    """A line for each arm: mean over its seeds with the 95% interval over seeds (Student's t)."""
    scores = {metric: scores_of(rows, metric, setting) for metric in metrics}
    lines = ["| arm | seeds | " + " | ".join(metrics) + " |", "|---|---:|" + "---:|" * len(metrics)]
    for arm in dict.fromkeys(name for own in scores.values() for name in own):
        cells, seeds = [], 0
        for metric in metrics:
            values = list(scores[metric].get(arm, {}).values())
            seeds = max(seeds, len(values))
            mean, low, high = mean_interval(values) if values else (0.0, 0.0, 0.0)
            bounds = f"<br>{low:.3f} to {high:.3f}" if len(values) > 1 else ""
            cells.append(f"{mean:.3f}{bounds}" if values else "-")
        lines.append(f"| {arm} | {seeds} | " + " | ".join(cells) + " |")
    return lines


def comparison_lines(
    rows: Sequence[Row], pairs: Sequence[tuple[str, str]], families: Sequence[Sequence[str]], setting: str = ""
) -> list[str]:
    """A line for each pair of arms and score: the paired difference and a verdict at 5%.

    Args:
        rows: of results.csv.
        pairs: (arm, other arm); those without two shared seeds are left out.
        families: scores whose p-values are adjusted together, by Holm, over all pairs.
        setting: of `gve uvrb run`; "" for the scores of `gve validate`.
    """
    lines = [
        "| comparison | score | difference | 95% interval | p, adjusted | detectable | verdict |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for family in families:
        effects: dict[tuple[str, str], Effect] = {}
        for metric in family:
            scores = scores_of(rows, metric, setting)
            for one, other in pairs:
                if len(set(scores.get(one, {})) & set(scores.get(other, {}))) > 1:
                    effects[f"{one} - {other}", metric] = compare(scores, one, other)
        names = {"\0".join(key): effect for key, effect in effects.items()}
        values = adjusted(names)
        lines += [_line(*key, effect, values["\0".join(key)]) for key, effect in effects.items()]
    return lines


def against(rows: Sequence[Row], baseline: str, setting: str = "") -> list[tuple[str, str]]:
    """Every arm that has a done run, against the baseline."""
    arms = dict.fromkeys(row.cell for row in rows if row.done and row.facts["setting"] == setting)
    return [(arm, baseline) for arm in arms if arm != baseline]


def undone(rows: Sequence[Row]) -> Mapping[str, str]:
    """Run -> why it has no result."""
    return {row.facts["run"]: f"{row.facts['state']}, {row.facts['reason']}" for row in rows if not row.done}


def _line(name: str, metric: str, effect: Effect, p: float) -> str:
    low, high = effect.interval
    verdict = "no detectable effect" if p > LEVEL else "higher" if effect.value > 0 else "lower"
    return (
        f"| {name} | {metric} | {effect.value:+.3f} | {low:+.3f} to {high:+.3f} | {p:.3f} | {effect.detectable:.3f} | "
        f"{verdict} |"
    )
