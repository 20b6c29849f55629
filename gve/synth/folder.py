"""A step on disk: units that grow line by line, are finished in one act, and survive a kill at any point.

Below the folder of a step::

    identity.json      what decides its results (gve.synth.units.Identity); begun with another one, it is refused
    00003.claim.2      who works on unit 3: the second owner (gve.synth.leases)
    00003.part.1       what the first owner got done: a line for each outcome, and for each reply while a row is open
    00003.jsonl        the finished unit: one outcome a line, in the order of its input rows
    00003.json         its manifest: counts, sha256, identity; with it the unit is finished
    done.json          all units are finished: their counts and places

A unit is finished by linking its whole file into place, which happens once, and then writing a manifest that follows
from that file alone. So whoever dies where, the next owner finds either all of it or the parts.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from gve.items import InputError
from gve.synth.leases import Claim, Survey, link_once, replace_file
from gve.synth.records import Reject, Reply
from gve.synth.units import Identity, Outcome, Row, Usage, canonical

DONE, IDENTITY = "done.json", "identity.json"


@dataclass
class Tally:
    """Sums over outcomes.

    Args:
        rows_in: outcomes, one for each row that came in.
        passed: outcomes that go on.
        dropped: reason -> outcomes that end here.
        rows_out: rows that go on; more than `passed` where a row becomes several pairs.
        tried, made: parts, see Outcome.
        failed: reason -> parts that were rejected.
        usage: what was asked.
    """

    rows_in: int = 0
    passed: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    rows_out: int = 0
    tried: int = 0
    made: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    usage: Usage = field(default_factory=Usage)

    def add(self, outcome: Outcome) -> None:
        self.rows_in += 1
        self.passed += bool(outcome.rows)
        self.rows_out += len(outcome.rows)
        self.tried += outcome.tried
        self.made += outcome.made
        self.usage += outcome.usage
        for reject in outcome.rejects:
            (self.dropped if reject.id == outcome.id else self.failed)[reject.reason] += 1

    def __iadd__(self, other: Tally) -> Tally:
        self.rows_in += other.rows_in
        self.passed += other.passed
        self.dropped += other.dropped
        self.rows_out += other.rows_out
        self.tried += other.tried
        self.made += other.made
        self.failed += other.failed
        self.usage += other.usage
        return self

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {
            "dropped": dict(sorted(self.dropped.items())),
            "failed": dict(sorted(self.failed.items())),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Tally:
        counters = {name: Counter(values[name]) for name in ("dropped", "failed")}
        return cls(**{**values, **counters, "usage": Usage(**values["usage"])})


@dataclass(frozen=True)
class Slice:
    """Consecutive lines of a finished unit: what a unit of the next step reads.

    Args:
        path: the unit's file.
        begin, end: bytes of it.
        count: rows in them.
    """

    path: Path
    begin: int
    end: int
    count: int

    def rows(self) -> Iterator[Row]:
        for outcome in self.outcomes():
            yield from outcome.rows

    def outcomes(self) -> Iterator[Outcome]:
        """Raises InputError where the file is no longer what was written."""
        with open(self.path, "rb") as file:
            file.seek(self.begin)
            while file.tell() < self.end:
                try:
                    yield Outcome.from_dict(json.loads(file.readline()))
                except (ValueError, KeyError, TypeError) as error:
                    raise InputError(
                        f"{self.path} is damaged near byte {file.tell()}: remove the run folder and begin anew"
                    ) from error


class Rows:
    """The rows of slices, in order; may be read again and again."""

    def __init__(self, slices: Iterable[Slice]) -> None:
        self._slices = tuple(slices)

    def __iter__(self) -> Iterator[Row]:
        for piece in self._slices:
            yield from piece.rows()

    def __len__(self) -> int:
        return sum(piece.count for piece in self._slices)


class StepFolder:
    """The folder of one step.

    Args:
        root: of the run.
        step: name of the step.
    """

    def __init__(self, root: Path, step: str) -> None:
        self.path = root / step
        self.step = step

    def identity(self) -> Identity | None:
        """What the step was begun with; None before it is."""
        try:
            return Identity(**json.loads((self.path / IDENTITY).read_bytes()))
        except FileNotFoundError:
            return None

    def adopt(self, identity: Identity) -> None:
        """Begins the step, or goes on with it.

        Raises:
            InputError: it was begun with something else.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if not link_once(self.path / IDENTITY, canonical(asdict(identity)).encode()):
            self.compare(identity.fingerprint, identity.after)

    def compare(self, fingerprint: Mapping[str, Any], after: str) -> None:
        """Raises InputError when the step was begun with another value of an entry of this fingerprint."""
        begun = self.identity()
        if begun is None:
            return
        mend = f"choose another --out, set it back, or begin the step anew by --redo {self.step}"
        if begun.after != after:
            raise InputError(f"{self.path} was begun after other results of the steps before it: {mend}")
        for name, ours in fingerprint.items():
            theirs = begun.fingerprint.get(name)
            if canonical(theirs) != canonical(ours):
                where, old, new = first_difference(name, theirs, ours)
                raise InputError(
                    f"{self.path} was begun with another {where} ({_short(old)} instead of {_short(new)}): {mend}"
                )

    def done(self) -> dict[str, Any] | None:
        """What done.json says: units, tally and slices; None while units are open."""
        try:
            return json.loads((self.path / DONE).read_bytes())
        except FileNotFoundError:
            return None

    def slices(self) -> list[Slice]:
        """The units of the next step.

        Raises:
            InputError: this step is not finished.
        """
        done = self.done()
        if done is None:
            raise InputError(f"step {self.step} of {self.path.parent} is not finished: run it first")
        return [Slice(self.path / file, *place) for file, *place in done["slices"]]

    def outcomes(self) -> Iterator[Outcome]:
        """Of all finished units, in order; also while others are open."""
        for unit in sorted(Survey.of(self.path).finished):
            file = self.path / f"{unit}.jsonl"
            yield from Slice(file, 0, file.stat().st_size, 0).outcomes()

    def manifest(self, unit: str) -> dict[str, Any]:
        return json.loads((self.path / f"{unit}.json").read_bytes())

    def publish(self, unit: str, draft: Path, slice_rows: int = 0) -> None:
        """Puts a unit into place.

        Args:
            unit: its name.
            draft: its file, complete and durable; removed.
            slice_rows: cut it into slices of so many rows for the next step; 0 keeps it in one.
        """
        path = self.path / f"{unit}.jsonl"
        try:
            os.link(draft, path)
        except FileExistsError:
            pass  # another owner was first, and its file is as good
        finally:
            draft.unlink(missing_ok=True)
        self.seal(unit, slice_rows)

    def seal(self, unit: str, slice_rows: int = 0) -> None:
        """Writes the manifest of a unit whose file is in place, and removes what led to it."""
        path = self.path / f"{unit}.jsonl"
        tally, digest, cuts = Tally(), hashlib.sha256(), [[0, 0, 0]]
        with open(path, "rb") as file:
            for line in file:
                outcome = Outcome.from_dict(json.loads(line))
                tally.add(outcome)
                digest.update(line)
                if slice_rows and cuts[-1][2] >= slice_rows:
                    cuts.append([cuts[-1][1], cuts[-1][1], 0])
                cuts[-1][1] += len(line)
                cuts[-1][2] += len(outcome.rows)
        identity = self.identity()
        assert identity is not None
        manifest = {
            "unit": unit,
            "sha256": digest.hexdigest(),
            "bytes": path.stat().st_size,
            "tally": tally.to_dict(),
            "slices": [[path.name, *cut] for cut in cuts if cut[2]],
            "identity": {"digest": identity.digest, **asdict(identity)},
        }
        replace_file(self.path / f"{unit}.json", canonical(manifest).encode(), durable=True)
        for pattern in ("part", "claim"):
            for left in self.path.glob(f"{unit}.{pattern}.*"):
                left.unlink(missing_ok=True)

    def close(self, units: list[str]) -> bool:
        """Writes done.json if all units are finished; returns whether they are."""
        if (self.path / DONE).exists():
            return True
        if not set(units) <= Survey.of(self.path).finished:
            return False
        tally, slices = Tally(), []
        for unit in units:
            manifest = self.manifest(unit)
            tally += Tally.from_dict(manifest["tally"])
            slices += manifest["slices"]
        done = {"units": len(units), "tally": tally.to_dict(), "slices": slices}
        replace_file(self.path / DONE, canonical(done).encode(), durable=True)
        for pattern in ("*.part.*", "*.claim.*", ".[0-9]*.tmp"):  # of owners that died after their unit was finished
            for left in self.path.glob(pattern):
                left.unlink(missing_ok=True)
        return True


class OpenUnit:
    """A unit in the hands of this worker: what was done before it, and what it adds.

    Args:
        claim: on the unit.
        rows: what goes in, all of it.
    """

    def __init__(self, claim: Claim, rows: Iterable[Row]) -> None:
        self.claim = claim
        rows = list(rows)
        self._order = {row["id"]: None for row in rows}
        self._lines: dict[str, bytes] = {}
        self.replies: dict[str, Reply] = {}
        self._part = claim.folder / f"{claim.unit}.part.{claim.generation}"
        self._recover()
        self.pending = [row for row in rows if row["id"] not in self._lines]
        self._file: BinaryIO | None = None
        self._dirty = False
        if len(self._order) != len(rows):
            raise ValueError(f"unit {claim.unit} of {claim.folder}: two rows have one id")

    def _recover(self) -> None:
        """Reads the parts of the owners before. A torn or damaged line is as good as not written."""
        for generation in range(1, self.claim.generation):
            part = self.claim.folder / f"{self.claim.unit}.part.{generation}"
            for line in part.read_bytes().split(b"\n")[:-1] if part.exists() else ():
                try:
                    record = json.loads(line)
                    if "reply" in record:
                        reply = Reply(**record["reply"])
                        self.replies.setdefault(reply.id, reply)
                    elif record["id"] in self._order:
                        self._lines.setdefault(record["id"], line)
                except (ValueError, KeyError, TypeError):
                    continue

    @property
    def recovered(self) -> int:
        """Rows that were answered before."""
        return len(self._order) - len(self.pending)

    @property
    def whole(self) -> bool:
        return len(self._lines) == len(self._order)

    def keep(self, reply: Reply) -> None:
        """Notes a reply, so that it need not be asked for again should the row not come to its end."""
        self._write(encode({"reply": asdict(reply)}))

    def add(self, outcome: Outcome) -> None:
        """Notes the outcome of a row.

        Raises:
            ValueError: it has one already, is none of this unit, or does not add up.
        """
        outcome.check()
        if outcome.id in self._lines or outcome.id not in self._order:
            raise ValueError(f"unit {self.claim.unit}: a second outcome, or one of no row: {outcome.id}")
        line = encode(outcome.to_dict())
        self._write(line)
        self._lines[outcome.id] = line

    def _write(self, line: bytes) -> None:
        # Unbuffered: what is written survives a kill of this process at once.
        if self._file is None:
            self._file = open(self._part, "ab", buffering=0)  # noqa: SIM115
        try:
            whole = self._file.write(line + b"\n") == len(line) + 1
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._part)) from error
        if not whole:  # the disk took a part of it; the next write would have raised
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._part))
        self._dirty = True

    def sync(self) -> None:
        """Makes what was written so far survive a power cut."""
        if self._dirty and self._file is not None:
            self._dirty = False
            os.fsync(self._file.fileno())

    def finish(self, folder: StepFolder) -> None:
        """Publishes the unit, its outcomes in the order of the rows, unless it was taken over."""
        self.close()
        if not self.claim.held:
            return
        draft = self.claim.folder / f".{self.claim.unit}.{uuid.uuid4().hex[:12]}.tmp"
        write_durably(draft, (self._lines[id] + b"\n" for id in self._order))
        folder.publish(self.claim.unit, draft)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def write_durably(path: Path, lines: Iterable[bytes]) -> None:
    """Writes a new file, to the disk; a file that did not come to its end is removed."""
    try:
        with open(path, "wb") as file:
            for line in lines:
                file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def encode(value: Any) -> bytes:
    """One line of JSON. Lone surrogates, which a model may write as an escape, go there and back."""
    return canonical(value).encode("utf-8", "surrogatepass")


def rejects(folder: StepFolder) -> Iterator[Reject]:
    """All rejects of the finished units of a step."""
    for outcome in folder.outcomes():
        yield from outcome.rejects


def first_difference(name: str, old: Any, new: Any) -> tuple[str, Any, Any]:
    """(dotted name, old value, new value) of the first leaf in which two values differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):
                return first_difference(f"{name}.{key}", old.get(key), new.get(key))
    return name, old, new


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
