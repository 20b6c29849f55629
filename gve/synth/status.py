"""How far a run is, read from its folder: nothing is asked of the workers, and nothing is changed."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gve.items import InputError
from gve.synth.folder import StepFolder, Tally
from gve.synth.leases import Beat, Survey, is_gone, read_beat
from gve.synth.pipeline import RUN, WHOLE


class Watch:
    """Looks at a run again and again; what is finished is read once.

    Args:
        out: folder of the run.
        prices: of a million tokens, price_prompt and price_completion; those of the run where not given.

    Raises:
        InputError: there is no run.
    """

    def __init__(self, out: str | Path, prices: Mapping[str, float] | None = None) -> None:
        self._out = Path(out)
        try:
            self._run: dict[str, Any] = json.loads((self._out / RUN).read_bytes())
        except (OSError, ValueError) as error:
            raise InputError(f"{out} holds no synthesis run: give the folder of `gve synth run --out`") from error
        self._prices = {**self._run["run"], **(prices or {})}
        self._done: dict[str, dict[str, Any]] = {}
        self._tallies: dict[tuple[str, str], Tally] = {}

    @property
    def steps(self) -> list[str]:
        """Names of the steps, in order."""
        return list(self._run["steps"])

    def look(self) -> dict[str, Any]:
        """The state of the run.

        Returns:
            JSON-able: `steps` by name, each with state ("done", "open", "waiting"), units (all, finished, claimed),
            rows (all, done, a count that may be None before it is known), rejected and failed parts by reason, usage,
            rate in rows a second and eta_s of the living workers; `usage` and `cost` of all steps; `workers` alive.
        """
        workers = self._workers()
        steps: dict[str, Any] = {}
        before: StepFolder | None = None
        for name in self.steps:
            folder = StepFolder(self._out, name)
            steps[name] = self._step(folder, before, [beat for beat in workers if beat.step == name])
            before = folder
        usage: dict[str, int] = {}
        for step in steps.values():
            usage = {key: usage.get(key, 0) + value for key, value in step["usage"].items()}
        cost = usage["prompt_tokens"] * self._prices["price_prompt"] / 1e6
        cost += usage["completion_tokens"] * self._prices["price_completion"] / 1e6
        return {
            "steps": steps,
            "usage": usage,
            "cost": round(cost, 4),
            "workers": [asdict(beat) for beat in workers],
            "finished": all(step["state"] == "done" for step in steps.values()),
        }

    def _workers(self) -> list[Beat]:
        """Those that live, as far as one look can tell: a minute and a lease of silence is death."""
        silent = 60.0 + float(self._run["run"]["lease_s"])
        living = []
        for path in sorted((self._out / "workers").glob("*.json")):
            beat = read_beat(path)
            if beat is None or is_gone(beat):
                continue
            try:
                if time.time() - path.stat().st_mtime < silent:
                    living.append(beat)
            except FileNotFoundError:
                continue
        return living

    def _step(self, folder: StepFolder, before: StepFolder | None, workers: list[Beat]) -> dict[str, Any]:
        if folder.step not in self._done and (done := folder.done()):
            self._done[folder.step] = done
        if done := self._done.get(folder.step):
            tally = Tally.from_dict(done["tally"])
            units = {"all": done["units"], "finished": done["units"], "claimed": 0}
            return self._row("done", units, {"all": tally.rows_in, "done": tally.rows_in}, tally, workers)
        names = self._units(before)
        units = {"all": len(names) or None, "finished": 0, "claimed": 0}
        rows = {"all": sum(names.values()) or None, "done": 0}
        if not folder.path.is_dir():
            return self._row("waiting", units, rows, Tally(), workers)
        survey = Survey.of(folder.path)
        tally = Tally()
        for unit in survey.finished:
            if (folder.step, unit) not in self._tallies:
                self._tallies[folder.step, unit] = Tally.from_dict(folder.manifest(unit)["tally"])
            tally += self._tallies[folder.step, unit]
        claimed = survey.claims.keys() - survey.finished
        units |= {"finished": len(survey.finished), "claimed": len(claimed)}
        rows["done"] = tally.rows_in + sum(_lines(folder, unit) for unit in claimed)
        if not rows["done"]:  # a step that sees the whole run has no parts
            rows["done"] = sum(beat.rows for beat in workers)
        return self._row("open", units, rows, tally, workers)

    def _units(self, before: StepFolder | None) -> dict[str, int]:
        """Unit -> rows of the step after `before`; empty while that is not known."""
        done = self._done.get(before.step) if before else None
        if done is None:
            return {}
        return {f"{number:05d}": count for number, (*_, count) in enumerate(done["slices"])} or {WHOLE: 0}

    @staticmethod
    def _row(
        state: str, units: dict[str, Any], rows: dict[str, Any], tally: Tally, workers: list[Beat]
    ) -> dict[str, Any]:
        rate = sum(beat.rows / beat.seconds for beat in workers if beat.seconds > 0)
        left = rows["all"] - rows["done"] if rows["all"] is not None and state == "open" else None
        return {
            "state": state,
            "units": units,
            "rows": rows,
            "out": tally.rows_out,
            "rejected": dict(tally.dropped.most_common()),
            "failed": dict(tally.failed.most_common()),
            "usage": asdict(tally.usage),
            "rate": round(rate, 3) if state == "open" else None,
            "eta_s": round(left / rate, 1) if left is not None and rate > 0 else None,
        }


def _lines(folder: StepFolder, unit: str) -> int:
    """Rows that the owners of an open unit have got done so far."""
    rows = set[bytes]()
    for part in folder.path.glob(f"{unit}.part.*"):
        try:
            lines = part.read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:  # finished meanwhile
            continue
        # An outcome's keys are sorted, so its id comes first; a reply's line begins otherwise.
        rows.update(line[: line.find(b'","')] for line in lines if line.startswith(b'{"id":'))
    return len(rows)


def check_files(out: str | Path) -> list[str]:
    """Compares every finished unit with its manifest; one line per problem."""
    problems = []
    for name in Watch(out).steps:
        folder = StepFolder(Path(out), name)
        for unit in sorted(Survey.of(folder.path).finished) if folder.path.is_dir() else ():
            path = folder.path / f"{unit}.jsonl"
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != folder.manifest(unit)["sha256"]:
                    problems.append(f"{path} is not the file that its manifest names")
    return problems
