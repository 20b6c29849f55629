"""How well does stage 1 find planted faults? Precision and recall of each filter, with Wilson's intervals.

    python experiments/0003-synth-filters/filters.py OUT --encoder NAME=MODEL [NAME=MODEL ...] [--jobs 1]

For each seed a pile of toy clips with planted faults (`gve toy faults`) goes through the real pipeline up to `select`.
Thresholds are chosen on the pile of one seed, each rule by itself, and reported on piles of other seeds. The first
encoder is the one of the run; the others only measure the similarity of the same rows.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gve.data.mixture import mixture
from gve.items import Item, Text
from gve.synth.audit.rates import wilson
from gve.synth.config import EncoderOptions, make_plan
from gve.synth.crew import run
from gve.synth.folder import Rows, StepFolder, rejects
from gve.synth.media import MediaStore
from gve.synth.quality import REASONS, Select, SelectOptions
from gve.synth.units import Context
from gve.toy.faults import PileRequest, make_pile, read_faults

HERE = Path(__file__).resolve().parent
TUNED_ON, REPORTED = 7, (0, 1, 2)
NORMAL = 1.959964
FILTERS: Mapping[str, tuple[str, ...]] = {
    "url": ("caption-url",),
    "file-name": ("caption-file-name",),
    "advertisement": ("caption-advertisement",),
    "non-descriptive": ("caption-non-descriptive",),
    "language": ("caption-language",),
    "too-short": ("caption-too-short",),
    "repeated": ("caption-repeated",),
    "wrong-caption": ("inconsistent",),
    "static": ("static-video",),
    "slide-show": ("slide-show",),
    "black": ("black-video",),
    "frozen": ("frozen-video",),
    "near-duplicate": ("near-duplicate",),
    "exact-duplicate": ("duplicate",),
    "damaged": tuple(code for code, reason in REASONS.items() if reason.step == "scan"),
}
"""Planted fault -> codes of the filter that is meant to find it; "repairable" is meant to be mended and kept."""
GRID: Mapping[str, tuple[str, Sequence[float]]] = {
    "min_selling": ("advertisement", (0.5, 1.0, 1.5)),
    "min_telling": ("non-descriptive", (1, 2, 3, 4)),
    "min_foreign": ("language", (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)),
    "max_black": ("black", (0.25, 0.5, 0.75, 0.9)),
    "max_static": ("static", (0.8, 0.9, 0.95, 0.98)),
    "max_slides": ("slide-show", (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)),
    "min_slide_change": ("slide-show", (0.05, 0.1, 0.15, 0.25, 0.35, 0.5)),
    "max_frozen": ("frozen", (0.3, 0.4, 0.5, 0.6, 0.7)),
    "max_bits": ("near-duplicate", (1.0, 2.0, 3.0, 4.0, 6.0)),
    "max_colour": ("near-duplicate", (2.0, 4.0, 6.0, 10.0)),
}
"""Option of `select` -> the fault whose filter it decides, and the values that are tried."""


@dataclass(frozen=True)
class Pile:
    """A pile and what became of it.

    Args:
        folder: of the pile.
        out: of the run.
        truth: id -> row of truth.jsonl.
    """

    folder: Path
    out: Path
    truth: Mapping[str, Mapping[str, str]]

    def rows(self, step: str) -> Rows:
        """What a step gave."""
        return Rows(StepFolder(self.out, step).slices())

    def rejected(self) -> dict[str, str]:
        """Id -> code of the rows that scan or select dropped."""
        found = [reject for step in ("scan", "select") for reject in rejects(StepFolder(self.out, step))]
        return {reject.id: reject.reason for reject in found if reject.id in self.truth}


def make(root: Path, seed: int, request: PileRequest, encoder: str, select: Mapping[str, Any], name: str) -> Pile:
    """The pile of a seed, through the pipeline up to `select`; what is there is used again."""
    folder, out = root / f"pile-{seed}", root / f"{name}-{seed}"
    make_pile(folder, replace(request, seed=seed))
    values = {
        "input": {"sources": [{"path": str(folder / "weak.jsonl"), "name": "toy"}]},
        "scan": {"cutting": {"max_frames": 0, "max_clips": 0}},
        "select": dict(select),
        "encoder": {"model": encoder, "frames": "uniform(8)", "max_frame_tokens": 9},
        "run": {"workers": 1, "unit_rows": 100},
    }
    run(make_plan(values, out, captioners={}, until="select"), "select")
    truth = {f"toy:{row['id']}": row for row in read_faults(folder)}
    return Pile(folder, out, truth)


def selected(rows: Rows, options: SelectOptions, out: Path) -> set[str]:
    """Ids that `select` drops with these options."""
    stage = Select(options, Context(MediaStore(out), 0, _no_encoder, lambda step: ()))
    return {outcome.id for outcome in stage.run(rows) if not outcome.rows}


def _no_encoder() -> Any:
    raise RuntimeError("select measures nothing")


# -------------------------------------------------------------------------------------------------------- thresholds


def f1(dropped: Iterable[str], pile: Pile, fault: str, ids: set[str]) -> float:
    """Of one filter alone, on its own fault and good rows; rows with another fault count neither way."""
    found = [pile.truth[id]["fault"] for id in dropped]
    right, wrong = found.count(fault), found.count("")
    planted = sum(pile.truth[id]["fault"] == fault for id in ids)
    return 2 * right / (right + wrong + planted) if planted else 0.0


def tuned(pile: Pile) -> dict[str, float]:
    """Option -> value with the best F1 on this pile; the default where no other is better."""
    rows = pile.rows("scan")
    ids = {row["id"] for row in rows}
    chosen: dict[str, float] = {}
    for option, (fault, values) in GRID.items():
        rule = FILTERS[fault]
        own = {name: value for name, value in chosen.items() if GRID[name][0] == fault}
        plain = SelectOptions(rules=rule, **own)
        scores = {}
        for value in dict.fromkeys((getattr(plain, option), *values)):
            scores[value] = f1(selected(rows, replace(plain, **{option: value}), pile.out), pile, fault, ids)
        chosen[option] = max(scores, key=lambda value: scores[value])  # the default stands first
    return chosen


Similarities = Mapping[str, float]


def similarities(pile: Pile, model: str) -> Similarities:
    """Id -> cosine of caption and clip, of good rows and of those with the caption of another clip."""
    encoder = EncoderOptions(model, frames="uniform(8)", max_frame_tokens=9).load()
    rows = [row for row in pile.rows("scan") if pile.truth[row["id"]]["fault"] in ("", "wrong-caption")]
    media, instruction = MediaStore(pile.out), mixture()["uvrd_t2v"].instruction
    items = [Item((Text(row["caption"]),), instruction) for row in rows]
    items += [Item((media.video(row["video"]),)) for row in rows]
    texts, clips = np.split(encoder.encode(items).vectors.astype(np.float64), 2)
    return dict(zip((row["id"] for row in rows), (texts * clips).sum(1).round(4).tolist(), strict=True))


def own_similarities(pile: Pile) -> Similarities:
    """The same as the run's own encoder gave them."""
    return {
        row["id"]: row["quality"]["similarity"]
        for row in pile.rows("scan")
        if pile.truth[row["id"]]["fault"] in ("", "wrong-caption")
    }


def best_threshold(values: Similarities, pile: Pile) -> float:
    """The similarity under which rows are dropped, with the best F1 on this pile."""
    ids = set(values)
    scores = {
        limit: f1([id for id, value in values.items() if value < limit], pile, "wrong-caption", ids)
        for limit in sorted(set(values.values()))
    }
    return max(scores, key=lambda limit: scores[limit])


def area(values: Sequence[tuple[float, bool]]) -> float:
    """Probability that a wrong caption is less similar than a right one (area under the ROC curve), ties half."""
    wrong = np.array([value for value, is_wrong in values if is_wrong])
    right = np.array([value for value, is_wrong in values if not is_wrong])
    lower = (wrong[:, None] < right).mean() + (wrong[:, None] == right).mean() / 2
    return float(lower)


# ------------------------------------------------------------------------------------------------------------ tables


def share(count: int, of: int) -> str:
    """A share with Wilson's 95% interval."""
    if not of:
        return "-"
    low, high = wilson(count / of, of, NORMAL)
    return f"{count / of:.2f} [{low:.2f}, {high:.2f}]"


def check_funnel(pile: Pile) -> None:
    """Raises AssertionError unless every row of the list is kept or rejected, once, and the funnel says so."""
    kept = [row["id"] for row in pile.rows("select")]
    dropped = pile.rejected()
    assert sorted([*kept, *dropped]) == sorted(pile.truth)
    steps = json.loads((pile.out / "funnel.json").read_text())["steps"]
    assert steps[0]["in"] == len(pile.truth)
    for step, after in zip(steps, [*steps[1:], {"in": len(kept)}], strict=True):
        assert step["in"] == step["out"] + sum(step["rejected"].values())
        assert step["out"] == after["in"]


def alone(fault: str, piles: Sequence[Pile], chosen: Mapping[str, Any]) -> tuple[int, int]:
    """Rows with the fault, and good rows, that its filter drops when no other filter is asked."""
    found: Counter[str] = Counter()
    for pile in piles:
        if fault == "damaged":
            dropped = {reject.id for reject in rejects(StepFolder(pile.out, "scan")) if reject.id in pile.truth}
        else:
            options = SelectOptions(**{**chosen, "drop_share": 0.0, "rules": FILTERS[fault]})
            dropped = selected(pile.rows("scan"), options, pile.out)
        found.update(pile.truth[id]["fault"] for id in dropped)
    return found[fault], found[""]


def table(piles: Sequence[Pile], chosen: Mapping[str, Any]) -> str:
    """Precision and recall of each filter alone, and what all of them do one after another, all piles together."""
    rejected = [(pile.truth[id]["fault"], code) for pile in piles for id, code in pile.rejected().items()]
    planted = Counter(row["fault"] for pile in piles for row in pile.truth.values())
    by_any = Counter(fault for fault, _ in rejected)
    lines = [
        "| planted fault | filter | recall, alone | precision, alone | dropped by it in the run | dropped in the run |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for fault, codes in FILTERS.items():
        right, wrong = alone(fault, piles, chosen)
        first = sum(what == fault and code in codes for what, code in rejected)
        lines.append(
            f"| {fault} | {codes[0] if len(codes) == 1 else 'scan'} | {share(right, planted[fault])} | "
            f"{share(right, right + wrong)} | {first} | {by_any[fault]} of {planted[fault]} |"
        )
    kept = {pile.out: {row["id"]: row for row in pile.rows("select")} for pile in piles}
    mended = [
        "repaired" in kept[pile.out][id]["meta"]
        for pile in piles
        for id, row in pile.truth.items()
        if row["fault"] == "repairable" and id in kept[pile.out]
    ]
    siblings = [row for pile in piles for row in pile.truth.values() if row["variant"] == "sibling"]
    lost = Counter(code for fault, code in rejected if not fault)
    bad = len(rejected) - sum(lost.values()) - by_any["repairable"]
    wanted = sum(planted.values()) - planted[""] - planted["repairable"]
    lines += [
        "",
        f"All filters one after another: {share(bad, wanted)} of the {wanted} bad rows dropped; "
        f"{share(bad, len(rejected))} of the {len(rejected)} dropped rows were bad. "
        f"Repairable files mended and kept: {share(sum(mended), planted['repairable'])} of {planted['repairable']}. "
        f"Good rows: {planted['']}, of which {sum(lost.values())} were dropped "
        f"({', '.join(f'{count} {code}' for code, count in lost.most_common()) or 'none'}); "
        f"{len(siblings)} of the good rows are siblings.",
    ]
    return "\n".join(lines) + "\n"


def consistency(measured: Mapping[str, Mapping[int, Similarities]], piles: Mapping[int, Pile]) -> str:
    """How well similarity tells the captions of other clips, for each encoder."""
    lines = [
        "| encoder | area under ROC | threshold of seed 7 | recall | precision | precision at the default 5% | lift |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, by_seed in measured.items():
        limit = best_threshold(by_seed[TUNED_ON], piles[TUNED_ON])
        pairs = [
            (value, piles[seed].truth[id]["fault"] == "wrong-caption")
            for seed in REPORTED
            for id, value in by_seed[seed].items()
        ]
        under = [wrong for value, wrong in pairs if value < limit]
        planted = sum(wrong for _, wrong in pairs)
        lowest = [wrong for _, wrong in sorted(pairs)[: math.floor(0.05 * len(pairs))]]
        lift = (sum(lowest) / len(lowest)) / (planted / len(pairs))
        lines.append(
            f"| {name} | {area(pairs):.3f} | {limit:.3f} | {share(sum(under), planted)} | "
            f"{share(sum(under), len(under))} | {share(sum(lowest), len(lowest))} | {lift:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of piles and runs; the same command goes on where it stopped")
    parser.add_argument("--encoder", nargs="+", required=True, metavar="NAME=MODEL", help="the first is the run's")
    parser.add_argument("--rows", type=int, default=480, help="of each pile")
    parser.add_argument("--share", type=float, default=0.5, help="of the rows that have a fault")
    parser.add_argument("--write", type=Path, default=HERE, help="where table.md and thresholds.json go")
    arguments = parser.parse_args()
    encoders = dict(named.split("=", 1) for named in arguments.encoder)
    first = next(iter(encoders.values()))
    request = PileRequest(rows=arguments.rows, share=arguments.share)
    piles = {TUNED_ON: make(arguments.out, TUNED_ON, request, first, {}, "tuned")}
    chosen: dict[str, float] = tuned(piles[TUNED_ON])
    chosen["min_similarity"] = best_threshold(own_similarities(piles[TUNED_ON]), piles[TUNED_ON])
    print(json.dumps(chosen), flush=True)
    for seed in REPORTED:
        piles[seed] = make(arguments.out, seed, request, first, chosen, "run")
        check_funnel(piles[seed])
        print(f"seed {seed}: {len(piles[seed].truth)} rows, the funnel adds up", flush=True)
    measured = {
        name: {
            seed: own_similarities(pile) if model == first else similarities(pile, model)
            for seed, pile in piles.items()
        }
        for name, model in encoders.items()
    }
    text = table([piles[seed] for seed in REPORTED], chosen) + "\n" + consistency(measured, piles)
    arguments.write.mkdir(parents=True, exist_ok=True)
    (arguments.write / "table.md").write_text(text)
    (arguments.write / "thresholds.json").write_text(json.dumps(chosen, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
