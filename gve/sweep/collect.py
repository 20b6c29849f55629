"""results.csv of a sweep: a row for every result, and for every run that has none, with the reason.

The table is made anew from the run folders each time, so it can be deleted; a folder that is missing or damaged costs
its own rows and no other. Two machines that did the same runs give the same table but for `VOLATILE`.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gve.eval.results import RESULTS, SavedResults, read_results, read_runs, write_whole
from gve.eval.uvrb import ABILITIES, ABILITY_PARTS, AVERAGES, ability_scores
from gve.items import InputError
from gve.sweep.crew import Site, read_state
from gve.sweep.plan import Run, Sweep

METRICS = (*AVERAGES, *ABILITIES, *ABILITY_PARTS["AVG-D"])
"""Columns of scores: averages, abilities, sets."""

FACTS = (
    "run",
    "sweep",
    "cell",
    "seed",
    "x",
    "setting",
    "state",
    "reason",
    "config",
    "commit",
    "weights",
    "protocol",
    "step",
)
VOLATILE = ("seconds_fit", "seconds_validate", "seconds_uvrb", "host", "hardware")
COLUMNS = (*FACTS, *METRICS, *VOLATILE)


@dataclass(frozen=True)
class Row:
    """One line of results.csv.

    Args:
        facts: column -> text, all of FACTS and VOLATILE.
        scores: average, ability or set -> score; empty unless the run is done.
    """

    facts: dict[str, str]
    scores: dict[str, float]

    @property
    def cell(self) -> str:
        return self.facts["cell"]

    @property
    def seed(self) -> int:
        return int(self.facts["seed"])

    @property
    def done(self) -> bool:
        return self.facts["state"] == "done"


def collect(sweep: Sweep, site: Site) -> list[Row]:
    """The rows of all runs of a sweep: by seed and cell as in the file, then by setting."""
    return [row for run in sweep.runs() for row in _rows(run, site.folder(run))]


def _rows(run: Run, folder: Path) -> list[Row]:
    facts = dict.fromkeys((*FACTS, *VOLATILE), "")
    facts |= {
        "run": run.id,
        "sweep": run.sweep,
        "cell": run.cell.name,
        "seed": str(run.seed),
        "x": "" if run.cell.x is None else f"{run.cell.x:g}",
        "config": run.config,
    }
    try:
        state = read_state(folder)
    except InputError as error:
        return [Row(facts | {"state": "failed", "reason": _told(str(error), folder)}, {})]
    facts |= {f"seconds_{name}": str(step["seconds"]) for name, step in state.get("steps", {}).items()}
    steps = [state.get("steps", {}).get(name, {}) for name in run.cell.steps]
    facts["host"] = next((step["host"] for step in steps if "host" in step), "")
    commits = [step.get("commit") or {} for step in steps]
    names = [commit.get("hash", "")[:12] + ("+" if commit.get("dirty") else "") for commit in commits]
    facts["commit"] = " ".join(dict.fromkeys(name for name in names if name))
    for name, step in zip(run.cell.steps, steps, strict=True):
        ended = step.get("state", "not begun")
        if ended != "done":
            kind = "failed" if ended == "failed" else "missing"
            reason = _told(str(step.get("reason", f"{name} {ended}")), folder)
            return [Row(facts | {"state": kind, "reason": reason}, {})]
    try:
        facts["hardware"] = _hardware(folder)
        return [_row(facts, setting, saved) for setting, saved in _results(run, folder)]
    except InputError as error:
        return [Row(facts | {"state": "failed", "reason": _told(f"damaged: {error}", folder)}, {})]


def _results(run: Run, folder: Path) -> list[tuple[str, SavedResults]]:
    """(setting, results) of all steps that score."""
    found = []
    if "validate" in run.cell.steps:
        found.append(("", read_results(folder / "uvrb.json")))
    if "uvrb" in run.cell.steps:
        found += [(saved.folder.name, saved) for saved in read_runs(folder / "uvrb")]
    return found


def _row(facts: dict[str, str], setting: str, saved: SavedResults) -> Row:
    """The line of one result. Abilities are made anew of the sets, whose values the positions beside them confirm.

    Raises:
        InputError: something that the line needs is missing or of another kind.
    """
    try:
        data = saved.data
        whole = {name: float(row["value"]) for name, row in data["sets"].items() if row["complete"]}
        abilities = ability_scores(whole)
        if abilities != data["abilities"]:
            raise InputError(f"{RESULTS} tells of abilities that are not those of its sets")
        lost = sorted(set(data["sets"]) - set(whole))
        own = {
            "setting": setting,
            "state": "done",
            "reason": f"incomplete: {', '.join(lost)}" if lost else "",
            "weights": f"{data['weights']:.16s}",  # refuses what is no text
            "protocol": f"{data['protocol']['hash']:s}",
            "step": str(int(data["step"])),
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{RESULTS} cannot be used ({type(error).__name__}: {error})") from None
    return Row(facts | own, whole | {name: value for name, value in abilities.items() if value is not None})


def _hardware(folder: Path) -> str:
    """As the newest attempt wrote it; "" for a run of `gve uvrb run` alone, which has a record of its own."""
    path = folder / "run.json"
    if not path.is_file():
        return ""
    try:
        hardware = json.loads(path.read_text())["attempts"][-1]["hardware"]
        cpu = f"{hardware['machine']}, {hardware['cpus']} CPUs, {hardware['threads']} threads"
        return ", ".join([cpu, *hardware["gpus"]])
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise InputError(f"{path.name} cannot be read ({error})") from None


def _told(reason: str, folder: Path) -> str:
    """A reason without the place of the run folder: the same on every machine."""
    return " ".join(reason.replace(f"{folder}/", "").replace(str(folder), "the run folder").split())


def write_results(path: Path, rows: Sequence[Row]) -> None:
    """Writes results.csv, whole or not at all; scores with six decimals."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        cells: dict[str, Any] = row.facts | {name: f"{value:.6f}" for name, value in row.scores.items()}
        writer.writerow([cells.get(name, "") for name in COLUMNS])
    write_whole(path, text.getvalue().encode())


def read_table(path: str | Path) -> list[Row]:
    """The rows of a results.csv.

    Raises:
        InputError: it cannot be read, or is no such table.
    """
    try:
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            lines = list(reader)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise InputError(f"{path} has other columns than a results.csv of gve sweep collect")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    return [
        Row(
            {name: line[name] for name in (*FACTS, *VOLATILE)},
            {name: float(line[name]) for name in METRICS if line[name]},
        )
        for line in lines
    ]
