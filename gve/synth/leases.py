"""Who works on what: workers of any number of processes and machines share work units by files alone.

Why claims and not a static share: captions take unequal time, and a killed or slow worker must not hold up the rest.
There is no coordinator and no lock that outlives its owner; what is needed is a POSIX file system (local, NFS, Lustre)
on which a hard link is made exactly once.

- A worker says that it lives by a file of its own, `workers/<id>.json`, whose count of beats rises.
- It owns a unit by a claim `<unit>.claim.<generation>`, made by a hard link: one worker wins. The highest generation
  owns the unit. Taking over from a dead worker is claiming the next generation, which again one worker wins.
- A worker of this machine is dead when its process is gone (seen at once, so a resumed run does not wait); one of
  another machine when its beats have not changed for `lease_s` of the observer's own clock: clocks are never compared.
- Whoever was taken for dead and wakes up finds a higher generation, or no claim, and leaves the unit alone. What it
  wrote in the meantime lies in the parts of its own generation, which nobody reads any more.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from gve.items import InputError


def link_once(path: Path, data: bytes) -> bool:
    """Writes a file that must not exist yet, whole and in one act; returns whether this call did it."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        draft.write_bytes(data)
        os.link(draft, path)
    except FileExistsError:
        return False
    finally:
        draft.unlink(missing_ok=True)
    return True


def replace_file(path: Path, data: bytes, *, durable: bool = False) -> None:
    """Writes a file in one rename. Any number of threads, processes and machines may do so at once: the last one wins.

    Args:
        durable: whether it must survive a power cut.
    """
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with open(draft, "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _machine() -> str:
    """Names this machine since its start, and the space that its process ids live in."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8])
        parts.append(str(os.stat("/proc/self/ns/pid").st_ino))
    return "-".join(parts)


def _born(pid: int) -> str:
    """When a process of this machine began, in ticks; empty where the system does not say, "gone" where it is no more.

    A zombie, dead but not yet waited for, is gone too.
    """
    try:
        # The name of the command is in brackets and may hold blanks; the state is the first field after it.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "gone" if fields[0] in "ZX" else fields[19]
    except OSError:
        if Path("/proc/self/stat").exists():
            return "gone"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "gone"
    except PermissionError:
        pass
    return ""


@dataclass
class Beat:
    """What a worker says about itself.

    Args:
        id: unique.
        machine, pid, born: where it lives, and when its process began, so that a reused process id is told apart.
        beat: rises while it lives.
        step: what it works on.
        rows: rows that it has finished in this step.
        seconds: how long it has worked on this step.
    """

    id: str
    machine: str
    pid: int
    born: str
    beat: int = 0
    step: str = ""
    rows: int = 0
    seconds: float = 0.0


class Worker:
    """This process as a worker of a run. Use as a context manager: it beats in a thread of its own until the end.

    Args:
        root: folder of the run.
        lease_s: after how many seconds without a beat a worker of another machine counts as dead. NFS may show
            attributes that are a minute old: use no less than 120 there.
    """

    def __init__(self, root: Path, lease_s: float = 120.0) -> None:
        self._folder = root / "workers"
        self._lease_s = lease_s
        pid = os.getpid()
        self._beat = Beat(f"{socket.gethostname()}-{pid}-{uuid.uuid4().hex[:8]}", _machine(), pid, _born(pid))
        self._since = time.monotonic()
        self._end = threading.Event()
        self._seen: dict[str, tuple[int, float]] = {}
        self._thread = threading.Thread(target=self._run, daemon=True, name="heartbeat")

    @property
    def id(self) -> str:
        return self._beat.id

    def begin(self, step: str) -> None:
        """From now on this worker works on `step`."""
        self._beat.step, self._beat.rows, self._since = step, 0, time.monotonic()

    def count(self, rows: int = 1) -> None:
        """It has finished some more rows."""
        self._beat.rows += rows

    def __enter__(self) -> Worker:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in self._folder.glob("*.json"):
                if (beat := read_beat(path)) and is_gone(beat):
                    path.unlink(missing_ok=True)
            self._write()
        except OSError as error:
            raise InputError(
                f"cannot write to {self._folder.parent} ({error.strerror}): choose another --out"
            ) from error
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        # Without its file a worker is dead for all, so what it leaves is taken over at once.
        with contextlib.suppress(OSError):
            (self._folder / f"{self.id}.json").unlink(missing_ok=True)

    def _run(self) -> None:
        while not self._end.wait(min(self._lease_s / 8, 5.0)):
            self._beat.beat += 1
            with contextlib.suppress(OSError):  # a full disk is reported by the work itself
                self._write()

    def _write(self) -> None:
        self._beat.seconds = round(time.monotonic() - self._since, 1)
        replace_file(self._folder / f"{self.id}.json", json.dumps(asdict(self._beat)).encode())

    def is_dead(self, id: str) -> bool:
        """Whether another worker is gone, as far as this one has watched it."""
        beat = read_beat(self._folder / f"{id}.json")
        if beat is None:
            return True
        known = is_gone(beat)
        if known is not None:
            return known
        last, since = self._seen.get(id, (-1, 0.0))
        if beat.beat != last:
            self._seen[id] = (beat.beat, time.monotonic())
            return False
        return time.monotonic() - since > self._lease_s


def read_beat(path: Path) -> Beat | None:
    """What a worker says about itself; None when its file is gone or of another version."""
    try:
        return Beat(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def is_gone(beat: Beat) -> bool | None:
    """Whether a worker's process is no more; None for another machine, where nobody here can tell."""
    return _born(beat.pid) != beat.born if beat.machine == _machine() else None


@dataclass
class Claim:
    """One worker's hold on one unit.

    Args:
        folder: of the step.
        unit: its name.
        generation: 1 for the first owner.
    """

    folder: Path
    unit: str
    generation: int

    @property
    def path(self) -> Path:
        return self.folder / f"{self.unit}.claim.{self.generation}"

    @property
    def held(self) -> bool:
        """Whether it still stands: nobody has taken over, and nobody has finished the unit."""
        return self.path.exists() and not self.path.with_suffix(f".{self.generation + 1}").exists()


@dataclass
class Survey:
    """One look at a step's folder.

    Args:
        finished: units that have a manifest.
        claims: unit -> highest generation of its claims.
    """

    finished: set[str] = field(default_factory=set)
    claims: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> Survey:
        found = cls()
        with os.scandir(folder) as entries:
            for entry in entries:
                unit, _, rest = entry.name.partition(".")
                if not unit.isdigit():
                    continue
                if rest == "json":
                    found.finished.add(unit)
                elif rest.startswith("claim.") and (number := rest.removeprefix("claim.")).isdigit():
                    found.claims[unit] = max(found.claims.get(unit, 0), int(number))
        return found


def take(folder: Path, units: list[str], worker: Worker) -> Claim | None:
    """Claims the first unit that is neither finished nor in the hands of a living worker.

    Args:
        folder: of the step.
        units: in the order in which this worker would take them.

    Returns:
        The claim, or None: all are finished or being worked on.
    """
    survey = Survey.of(folder)
    dead: dict[str, bool] = {}
    for unit in units:
        if unit in survey.finished:
            continue
        generation = survey.claims.get(unit, 0)
        if generation:
            owner = _owner(folder / f"{unit}.claim.{generation}")
            if owner == worker.id:
                continue
            if owner not in dead:
                dead[owner] = worker.is_dead(owner)
            if not dead[owner]:
                continue
        claim = Claim(folder, unit, generation + 1)
        if link_once(claim.path, json.dumps({"worker": worker.id}).encode()):
            if not (folder / f"{unit}.json").exists():
                return claim
            claim.path.unlink(missing_ok=True)  # finished between the survey and the claim
    return None


def _owner(path: Path) -> str:
    """The worker that made a claim; empty, a worker that nobody has seen, when the claim is gone."""
    try:
        values: dict[str, Any] = json.loads(path.read_bytes())
        return str(values["worker"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
