"""Does the runs of a sweep: N at a time, each step a process of its own, each run a folder of its own.

`<out>/<sweep>/<run id>/` is the run folder of `gve fit`, with two files more: `overlay.yaml`, what the sweep lays over
the configurations, and `sweep.json`, what was done and how it ended. The same command goes on where it was interrupted;
a run that failed is tried again by the next command, and stops no other. Several commands may work on one folder.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import IO, Any, Protocol

import yaml

from gve.items import InputError
from gve.sweep.plan import Run, World, filled, merged, steps_left

STOPPED = 85
"""Exit code of a step, and of the sweep, that was asked to stop and can be continued (as of `gve fit`)."""

POLL_S = 0.2

_ENTRY: dict[str, type | tuple[type, ...]] = {
    "state": str,
    "attempts": int,
    "seconds": (int, float),
    "host": str,
    "commit": (dict, NoneType),
}
"""What sweep.json tells of a step -> its type."""


class WorkError(Exception):
    """Work that all runs rest on has failed."""


class Child(Protocol):
    """A process of a step, as subprocess.Popen is one."""

    def poll(self) -> int | None: ...

    def send_signal(self, number: int, /) -> None: ...


Spawn = Callable[[list[str], Path, Mapping[str, str]], Child]
"""(words after `gve`, log file, environment) -> its process."""


@dataclass(frozen=True)
class Site:
    """Where and how runs are done; no part of their ids.

    Args:
        out: folder of all sweeps and toy worlds.
        values: nested mapping of machine values (`gve.sweep.plan.PLACES`), laid over everything.
        launch: words before the command of each step, such as ("srun",).
    """

    out: Path
    values: Mapping[str, Any] = field(default_factory=dict)
    launch: tuple[str, ...] = ()

    def folder(self, run: Run) -> Path:
        """The run folder."""
        return self.out / run.sweep / run.id

    def world(self, world: World) -> Path:
        """Folder of a toy world."""
        return self.out / "worlds" / world.name

    def overlay(self, run: Run) -> dict[str, Any]:
        """What is laid over the configurations of a run: seed, the cell's values, the toy world, the machine."""
        places = {name: str(self.out / run.sweep / other) for name, other in run.needs.items()}
        layers: list[Mapping[str, Any]] = [filled(run.cell.values, places), {"seed_everything": run.seed}]
        if run.cell.world:
            world = self.world(run.cell.world)
            layers.append(
                {
                    "model": {"base": str(world / "base")},
                    "data": {"root": str(world / "shards")},
                    "uvrb": {"root": str(world / "uvrb")},
                }
            )
        return merged(*layers, self.values)

    def words(self, run: Run, step: str) -> list[str]:
        """The command of a step, after `gve`."""
        folder = self.folder(run)
        checkpoint = folder / "checkpoints" / f"{run.cell.checkpoint}.ckpt"
        if step == "uvrb":
            places = {name: str(self.out / run.sweep / other) for name, other in run.needs.items()}
            values = self.overlay(run)
            model = filled(run.cell.benchmark.model, places) or str(checkpoint)
            root = values.get("uvrb", {}).get("root")
            if not root:
                raise InputError(f"cell {run.cell.name}: give the folder of the sets by --set uvrb.root=FOLDER")
            base = values.get("model", {}).get("base")
            words = ["uvrb", "run", "--model", model, "--root", root, "--out", str(folder / "uvrb")]
            return [*words, *run.cell.benchmark.words(), *(["--base", base] if base else [])]
        configs = [*map(str, run.cell.configs), str(folder / "overlay.yaml")]
        words = [step, *(word for path in configs for word in ("--config", path))]
        words += ["--trainer.default_root_dir", str(folder)]
        if step == "fit":
            return [*words, "--ckpt_path", "auto"]
        return [*words, *(["--ckpt_path", str(checkpoint)] if "fit" in run.cell.steps else [])]


def command_line(words: Sequence[str], launch: Sequence[str] = ()) -> str:
    """As a user would type it."""
    return shlex.join([*launch, "gve", *words])


def read_state(folder: Path) -> dict[str, Any]:
    """The content of a run's sweep.json; empty where the run was never begun.

    Raises:
        InputError: it is damaged.
    """
    path = folder / "sweep.json"
    try:
        state = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"damaged: {path.name} cannot be read ({error})") from None
    if not isinstance(state, dict) or not isinstance(state.get("steps"), dict):
        raise InputError(f"damaged: {path.name} does not tell of steps")
    for name, step in state["steps"].items():
        told = isinstance(step, dict) and all(isinstance(step.get(key), kind) for key, kind in _ENTRY.items())
        if not told or not isinstance((step.get("commit") or {}).get("hash", ""), str):
            raise InputError(f"damaged: {path.name} does not tell how {name} went")
    return state


def product_problem(run: Run, step: str, folder: Path) -> str:
    """Why the product of a step that is said to be done cannot be used; "" if it can."""
    from gve.eval.results import read_results, read_runs  # imports torch

    if step == "fit":
        path = folder / "checkpoints" / f"{run.cell.checkpoint}.ckpt"
        whole = path.is_file() and path.stat().st_size > 0
        return "" if whole else f"damaged: no checkpoint at {path.relative_to(folder)}"
    try:
        if step == "validate":
            read_results(folder / "uvrb.json")
        else:
            read_runs(folder / "uvrb")
    except InputError as error:
        return f"damaged: {error}"
    return ""


@dataclass
class Outcome:
    """How the runs of a command stand at its end, by run id.

    Args:
        done: all steps done, now or before.
        failed: id -> reason.
        stopped: begun, and to be continued.
        elsewhere: in work by another command.
    """

    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    stopped: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)

    @property
    def code(self) -> int:
        """Exit code: 85 when asked to stop, 1 when a run failed, else 0."""
        return STOPPED if self.stopped else 1 if self.failed else 0


def make_worlds(worlds: Iterable[World], site: Site, say: Callable[[str], object]) -> None:
    """Makes the toy worlds that are not there; a command that finds another at it waits.

    Raises:
        WorkError: one could not be made.
    """
    for world in dict.fromkeys(worlds):
        folder = site.world(world)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.with_name(world.name + ".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (folder / "world.json").is_file():
                continue
            say(f"making the toy world {folder}")
            log = folder.with_name(world.name + ".log")
            with open(log, "a") as file:
                code = subprocess.call([sys.executable, "-m", "gve", *world.words(folder)], stdout=file, stderr=file)
            if code:
                raise WorkError(f"the toy world {folder} could not be made: {last_line(log)}")


def write_overlay(run: Run, site: Site) -> Path:
    """Makes the run folder and its overlay.yaml. Returns the file."""
    folder = site.folder(run)
    folder.mkdir(parents=True, exist_ok=True)
    text = f"# Laid over the configurations of run {run.id} of sweep {run.sweep} by gve sweep.\n"
    _write(folder / "overlay.yaml", text + yaml.safe_dump(site.overlay(run), sort_keys=False))
    return folder / "overlay.yaml"


class Crew:
    """Does runs, `jobs` at a time.

    Args:
        site: where and how.
        jobs: processes at a time.
        spawn: starts a step; a process of this Python when None.
        say: told one line about each event.
    """

    def __init__(
        self, site: Site, jobs: int = 1, *, spawn: Spawn | None = None, say: Callable[[str], object] = print
    ) -> None:
        self.site, self.jobs, self.say = site, jobs, say
        self._spawn = spawn or self._process
        self._stop = False
        self._working: dict[str, _Work] = {}
        self._commit: dict[str, Any] | None = None

    def stop(self, *_: Any) -> None:
        """Asks the steps at work to save and end, and begins no other; may be a signal handler."""
        self._stop = True

    def work(self, runs: Sequence[Run]) -> Outcome:
        """Does what is left of the runs and returns when nothing is left that could be done."""
        from gve.callbacks.run_record import commit_of_code  # imports lightning

        self._commit = commit_of_code()
        outcome, waiting, told = Outcome(), list(runs), False
        while waiting or self._working:
            if self._stop and not told:
                told = True
                waiting = []
                for work in self._working.values():
                    work.child.send_signal(signal.SIGTERM)
            waiting = self._begin(waiting, outcome)
            for name, work in list(self._working.items()):
                if (code := work.child.poll()) is not None:
                    del self._working[name]
                    self._end(work, code, outcome)
            if self._working:
                time.sleep(POLL_S)
        return outcome

    def _begin(self, waiting: list[Run], outcome: Outcome) -> list[Run]:
        """Starts what can start; returns what has to wait."""
        left = []
        for run in waiting:
            lost = [other for other in run.needs.values() if other in outcome.failed or other in outcome.elsewhere]
            if lost:
                outcome.failed[run.id] = f"needs {lost[0]}, which is not done"
                self.say(f"{run.id}: {outcome.failed[run.id]}")
            elif len(self._working) < self.jobs and all(other in outcome.done for other in run.needs.values()):
                self._open(run, outcome)
            else:
                left.append(run)
        return left

    def _open(self, run: Run, outcome: Outcome) -> None:
        folder = self.site.folder(run)
        write_overlay(run, self.site)
        lock = open(folder / "lock", "w")  # noqa: SIM115 (held until the run ends)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            outcome.elsewhere.append(run.id)
            self.say(f"{run.id}: another command is at it")
            return
        try:
            state = read_state(folder)
        except InputError as error:
            self.say(f"{run.id}: {error}; its steps are done again")
            state = {}
        if not state:
            state = {"id": run.id, "sweep": run.sweep, "cell": run.cell.name, "seed": run.seed, "config": run.config}
        steps = state.setdefault("steps", {})
        done = {step: steps.get(step, {}).get("state") == "done" for step in run.cell.steps}
        for step in [step for step, ended in done.items() if ended]:
            if step == "fit" and done.get(run.cell.steps[-1]):
                continue  # a checkpoint that was removed after it was scored is not missed
            if problem := product_problem(run, step, folder):
                self.say(f"{run.id}: {problem}; {step} is done again")
                done[step] = False
        if done.get("fit") and not all(done.values()) and product_problem(run, "fit", folder):
            done["fit"] = False
        work = _Work(run, folder, lock, state, list(steps_left(run, done)))
        if not work.left:
            outcome.done.append(run.id)
            lock.close()
            return
        self._next(work)

    def _next(self, work: _Work) -> None:
        step = work.left[0]
        past = work.state["steps"].get(step, {})
        attempt = past.get("attempts", 0) + 1
        work.log = work.folder / "logs" / f"{step}.{attempt}.log"
        work.log.parent.mkdir(exist_ok=True)
        words = self.site.words(work.run, step)
        work.state["steps"][step] = {
            "state": "running",
            "attempts": attempt,
            "seconds": past.get("seconds", 0.0),
            "host": socket.gethostname(),
            "commit": self._commit,
            "command": command_line(words, self.site.launch),
        }
        _write_json(work.folder / "sweep.json", work.state)
        work.begun = time.monotonic()
        environment = {"OMP_NUM_THREADS": str(max(1, _cores() // self.jobs)), **os.environ}
        work.child = self._spawn(words, work.log, environment)
        self._working[work.run.id] = work

    def _end(self, work: _Work, code: int, outcome: Outcome) -> None:
        step, run = work.left[0], work.run
        entry = work.state["steps"][step]
        entry["seconds"] = round(entry["seconds"] + time.monotonic() - work.begun, 1)
        entry["code"] = code
        problem = "" if code else product_problem(run, step, work.folder)
        if code == 0 and not problem:
            entry["state"] = "done"
        elif code == STOPPED or (code and self._stop):
            entry |= {"state": "stopped", "reason": f"asked to stop in {step}"}
        else:
            entry |= {"state": "failed", "reason": problem or f"{step} ended with {code}: {last_line(work.log)}"}
        _write_json(work.folder / "sweep.json", work.state)
        self.say(f"{run.id}: {step} {entry['state']}, {entry['seconds']:.0f} s {entry.get('reason', '')}".rstrip())
        if entry["state"] == "done":
            work.left.pop(0)
            if work.left and not self._stop:
                self._next(work)
                return
            (outcome.stopped if work.left else outcome.done).append(run.id)
        elif entry["state"] == "stopped":
            outcome.stopped.append(run.id)
        else:
            outcome.failed[run.id] = entry["reason"]
        work.lock.close()

    def _process(self, words: list[str], log: Path, environment: Mapping[str, str]) -> Child:
        # A session of its own: Ctrl-C is for the sweep, which then asks each step to save and stop.
        with open(log, "wb") as file:
            return subprocess.Popen(
                [*self.site.launch, sys.executable, "-m", "gve", *words],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                start_new_session=True,
            )


@dataclass
class _Work:
    """A run in work: its lock, what is known of it, and the steps that are left, the first of them at work."""

    run: Run
    folder: Path
    lock: IO[str]
    state: dict[str, Any]
    left: list[str]
    log: Path = Path()
    begun: float = 0.0
    child: Child = field(init=False)


def last_line(log: Path) -> str:
    """The last line of a log that says something, at most 300 letters.

    A launcher speaks after the command, of the exit code alone: its lines count where there are no others.
    """
    try:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    except OSError:
        return "no log"
    said = [line[:300] for line in lines if line]
    return next(
        (line for line in reversed(said) if not line.startswith(("srun: ", "slurmstepd: "))),
        said[-1] if said else "the log is empty",
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _write(path: Path, text: str) -> None:
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(text)
    os.replace(draft, path)


def _write_json(path: Path, value: Any) -> None:
    _write(path, json.dumps(value, indent=1) + "\n")
