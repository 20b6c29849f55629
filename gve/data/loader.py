"""Planned rows -> TrainBatch: built in loader workers, with bad samples masked, written down and counted."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from gve.data.negatives import MinedNegatives
from gve.data.plan import Rows, permutation
from gve.data.schema import ShardError
from gve.data.shards import QUERY, TARGET
from gve.data.sources import Source
from gve.inputs import InputBuilder, Prepared
from gve.items import Frames, InputError, Item, Pair, TrainBatch, Video
from gve.video import Sampling, frame_indices

log = logging.getLogger(__name__)

_LOSSES = 4  # of workers at one sample; after two it is masked, the rest is for a machine in trouble

PADDING_ROW = -1
"""Row number that stands for no row: dev batches are filled up with it, so that all ranks see equal shapes."""


class Steps(Protocol):
    """What a loader walks over: the plan of an epoch, or the dev batches."""

    first_step: int
    num_steps: int

    def rows(self, step: int, rank: int, world: int) -> Rows: ...


class Quarantine:
    """Samples that could not be read: a file of this rank, written before the batch that lacks them is used.

    A replay must mask what the first run masked. So an entry holds in the very step that made it, and in all later
    epochs; elsewhere in its own epoch the sample is tried again, as it was.

    Args:
        folder: of the run; every `quarantine-<rank>.jsonl` in it is read, this rank's is written.
        rank: of this process.
        max_skip_rate: share of unreadable samples above which the run stops; counted over at least 1,000 samples.
    """

    def __init__(self, folder: Path, rank: int = 0, max_skip_rate: float = 0.01) -> None:
        self._file = folder / f"quarantine-{rank}.jsonl"
        self._max_skip_rate = max_skip_rate
        self._entries: dict[str, dict[tuple[int, int], str]] = {}
        self.samples = 0
        """Samples asked for in this process so far."""
        self.skipped: Counter[str] = Counter()
        """Source -> samples masked in this process so far."""
        self.fault = ""
        """Why the run must stop: more samples than allowed could not be read. Empty while it may go on."""
        for path in sorted(folder.glob("quarantine-*.jsonl")):
            for line in path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the last line of a killed process
                self._entries.setdefault(entry["key"], {})[entry["epoch"], entry["step"]] = entry["reason"]

    def reason(self, key: str, epoch: int, step: int) -> str:
        """Why the sample is masked in this step; empty when it may be read."""
        for (since, at), reason in self._entries.get(key, {}).items():
            if epoch > since or (epoch, step) == (since, at):
                return reason
        return ""

    def add(self, key: str, epoch: int, step: int, reason: str) -> None:
        """Writes an entry through to the disk, unless it holds already."""
        if self.reason(key, epoch, step):
            return
        self._entries.setdefault(key, {})[epoch, step] = reason
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with open(self._file, "a") as file:
            file.write(json.dumps({"key": key, "epoch": epoch, "step": step, "reason": reason}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        log.warning("sample %s is masked: %s", key, reason)

    def account(self, batch: TrainBatch) -> None:
        """Writes down and counts what a batch lacks; sets `fault` when that is more than allowed."""
        for key, reason in batch.skipped:
            self.add(key, batch.epoch, batch.step, reason)
        self.samples += len(batch)
        self.skipped[batch.source] += len(batch.skipped)
        skipped = self.skipped.total()
        if skipped > self._max_skip_rate * max(self.samples, 1000):
            key, reason = batch.skipped[-1] if batch.skipped else ("", "")
            self.fault = (
                f"{skipped} of {self.samples} samples could not be read, max_skip_rate is {self._max_skip_rate}; "
                f"the last one: {key}: {reason}; all are in {self._file}"
            )


@dataclass(frozen=True, eq=False)
class StepBuilder:
    """Reads and prepares the rows of one step.

    Args:
        sources: in the order of the plan.
        builder: makes model inputs.
        negatives: hard negatives used per pair, for each source.
        seed: of the run.
        quarantine: samples that are masked without being read.
        in_flight: [workers, 3] int64 in shared memory: process id, step and row that each worker is at; it outlives a
            worker that dies.
        mined: where a pair's own negatives are fewer than wanted, these follow, the hardest first.
        held_out: source -> sorted rows whose targets are no negatives, as they are never trained on.
    """

    sources: Sequence[Source]
    builder: InputBuilder
    negatives: Sequence[int]
    seed: int
    quarantine: Quarantine
    in_flight: torch.Tensor
    mined: MinedNegatives = field(default_factory=MinedNegatives)
    held_out: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __call__(self, rows: Rows) -> TrainBatch:
        source = self.sources[rows.source]
        worker = getattr(get_worker_info(), "id", 0)
        queries: list[Prepared] = []
        targets: list[Prepared] = []
        negatives: list[Prepared] = []
        skipped: list[tuple[str, str]] = []
        negative_index = torch.full((len(rows.places), self.negatives[rows.source]), -1)
        for i, place in enumerate(rows.places):
            if place[2] == PADDING_ROW:
                queries.append(self.builder.placeholder("padding"))
                targets.append(self.builder.placeholder("padding"))
                continue
            self.in_flight[worker] = torch.tensor([os.getpid(), rows.step, place[2]])
            key = source.key(place[2])
            hard: list[tuple[str, Item | tuple[Source, int]]] = []
            try:
                pair = self._read(source, key, rows, place)
                query, target = self.builder.prepare(pair.query), self.builder.prepare(pair.target)
                hard = self._hard(source, place[2], pair, self.negatives[rows.source])
            except (InputError, OSError) as error:
                reason = _one_line(error)
                skipped.append((key, reason))
                query, target = self.builder.placeholder(reason), self.builder.placeholder(reason)
            queries.append(query)
            targets.append(target)
            for j, (name, negative) in enumerate(hard):
                # A negative that cannot be read is left out alone; it has a name of its own in the quarantine.
                name = f"{key}#{name}"
                try:
                    if reason := self.quarantine.reason(name, rows.epoch, rows.step):
                        raise InputError(reason)
                    item = negative if isinstance(negative, Item) else self._target(*negative)
                    negatives.append(self.builder.prepare(item))
                    negative_index[i, j] = len(negatives) - 1
                except (InputError, OSError) as error:
                    skipped.append((name, _one_line(error)))
        self.in_flight[worker] = -1
        return TrainBatch(
            query=self.builder.collate(queries),
            target=self.builder.collate(targets),
            negatives=self.builder.collate(negatives) if negatives else None,
            negative_index=negative_index,
            task=source.record.task,
            source=source.name,
            epoch=rows.epoch,
            step=rows.step,
            seed=rows.seed,
            rows=tuple((number, position) for number, position, _ in rows.places),
            skipped=tuple(skipped),
        )

    def _read(self, source: Source, key: str, rows: Rows, place: tuple[int, int, int]) -> Pair:
        number, position, row = place
        if reason := self.quarantine.reason(key, rows.epoch, rows.step):
            raise InputError(reason)
        pair = source.read(row)
        wanted = self.negatives[rows.source]
        if len(pair.negatives) > wanted:
            # Keyed by the place in the source's order, not by the step: another batch size keeps the choice.
            order = permutation(len(pair.negatives), self.seed, "negatives", source.name, number, position)
            pair = replace(pair, negatives=tuple(pair.negatives[j] for j in np.sort(order[:wanted])))
        return replace(
            pair,
            query=self._thinned(source, pair.query),
            target=self._thinned(source, pair.target),
            negatives=tuple(self._thinned(source, negative) for negative in pair.negatives),
        )

    def _hard(self, source: Source, row: int, pair: Pair, wanted: int) -> list[tuple[str, Item | tuple[Source, int]]]:
        """(name, negative or the row whose target it is): the pair's own negatives, then mined ones."""
        found: list[tuple[str, Item | tuple[Source, int]]] = []
        taken = {int(source.index[row, QUERY]), int(source.index[row, TARGET])}
        for negative in pair.negatives:
            found.append((negative.content_hash()[:12], negative))
            taken.add(int(negative.content_hash()[:16], 16))
        if len(found) < wanted:
            for corpus, other in self.mined(source.name, row):
                content = int(corpus.index[other, TARGET])
                held_out = self.held_out.get(corpus.name, ()) if corpus.root is source.root else ()
                if len(found) < wanted and content not in taken and not _is_in(other, held_out):
                    taken.add(content)
                    found.append((corpus.key(other), (corpus, other)))
        return found

    def _target(self, source: Source, row: int) -> Item:
        return self._thinned(source, source.read(row).target)

    def _thinned(self, source: Source, item: Item) -> Item:
        return thinned(source, item, self.builder.policy.sampling)


def _is_in(row: int, rows: Sequence[int] | np.ndarray) -> bool:
    """Whether sorted rows hold a row."""
    place = int(np.searchsorted(rows, row))
    return place < len(rows) and int(rows[place]) == row


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__


def thinned(source: Source, item: Item, sampling: Sampling) -> Item:
    """An item of a source with the frames that a run asks for; the source may store more."""
    presample = source.record.presample
    return item if presample is None or presample.sampling == sampling else thin(item, sampling)


def thin(item: Item, sampling: Sampling) -> Item:
    """The item with fewer of its stored frames: those nearest to the frames that the sampling asks for."""
    parts = []
    for part in item.parts:
        if isinstance(part, Video) and isinstance(part.source, Frames):
            stored = part.source
            wanted = frame_indices(stored.num_frames, stored.native_fps, sampling)
            keep = np.abs(stored.indices[None, :] - wanted[:, None]).argmin(axis=1)
            frames = replace(
                stored, pixels=stored.pixels[keep], times_s=stored.times_s[keep], indices=stored.indices[keep]
            )
            part = replace(part, source=frames)
        parts.append(part)
    return replace(item, parts=tuple(parts))


class _StepDataset(IterableDataset):
    """Worker w of n builds every n-th step, in order: who builds a step never changes what is in it."""

    def __init__(self, steps: Steps, first_step: int, build: StepBuilder, rank: int, world: int) -> None:
        self._steps, self._first_step, self._build, self._rank, self._world = steps, first_step, build, rank, world

    def __iter__(self) -> Iterator[TrainBatch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        for step in range(self._first_step + worker, self._steps.num_steps, workers):
            yield self._build(self._steps.rows(step, self._rank, self._world))


class StepLoader:
    """Yields the batches of a plan in order; survives the death of a worker.

    A worker that is lost is started again at the step that is missing. When the same sample is lost a second time, it
    goes to the quarantine. (With 0 workers nothing can be survived.)

    Args:
        begin: called when an iteration really starts, gives the steps to walk. Lightning calls iter() early, before
            the curriculum of the epoch is final; the plan is asked for with the first batch only.
        build: rows -> batch.
        num_steps: length that is told to Lightning: steps of a whole epoch, done ones included.
        num_workers: processes that build.
        rank, world: this process and how many there are.
        timeout_s: a worker that is waited for longer than this is killed.
        agree: called at every step of every rank with why this one must stop (mostly ""); gives why all must. A rank
            that stopped alone would leave the others waiting in their next collective.
    """

    def __init__(
        self,
        begin: Callable[[], Steps],
        build: StepBuilder,
        num_steps: int,
        *,
        num_workers: int,
        rank: int = 0,
        world: int = 1,
        timeout_s: float = 900.0,
        agree: Callable[[str], str] = str,
    ) -> None:
        self._begin, self._build, self._num_steps, self._timeout_s = begin, build, num_steps, timeout_s
        self._num_workers, self._rank, self._world, self._agree = num_workers, rank, world, agree

    def __len__(self) -> int:
        return self._num_steps

    def __iter__(self) -> Iterator[TrainBatch]:
        steps = self._begin()
        step = steps.first_step
        lost: Counter[str] = Counter()
        while step < steps.num_steps:
            first = step
            stream = self._start(steps, first)
            while step < steps.num_steps:
                try:
                    batch = self._next(stream, (step - first) % max(self._num_workers, 1))
                except (RuntimeError, OSError, EOFError) as error:
                    self._bury(steps, error, lost)
                    break
                self._build.quarantine.account(batch)
                if fault := self._agree(self._build.quarantine.fault):
                    raise ShardError(fault)
                step = batch.step + 1
                yield batch
            del stream  # joins its workers, and terminates one that hangs

    def state_dict(self) -> dict[str, int]:
        """Empty: the position is in the DataModule's state. Having it tells Lightning that a resume is exact."""
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Nothing to load, see `state_dict`."""

    def _start(self, steps: Steps, first_step: int) -> Iterator[TrainBatch]:
        self._build.in_flight.fill_(-1)
        dataset = _StepDataset(steps, first_step, self._build, self._rank, self._world)
        loader = DataLoader(
            dataset,
            batch_size=None,
            num_workers=self._num_workers,
            pin_memory=torch.cuda.is_available(),
        )
        stream = iter(loader)
        # torch's handler of SIGCHLD raises wherever the main thread happens to be, in a backward pass too. Without it
        # the loss is found where the batch is waited for, within 5 s.
        if threading.current_thread() is threading.main_thread():
            handler = signal.getsignal(signal.SIGCHLD)
            if getattr(handler, "__module__", "").startswith("torch."):
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return stream

    def _next(self, stream: Iterator[TrainBatch], worker: int) -> TrainBatch:
        """The next batch; a worker that owes it for too long is killed, which then counts as its death.

        (DataLoader's own timeout would hide the death of a worker until it has passed.)
        """
        watch = threading.Timer(self._timeout_s, self._kill, [worker])
        watch.daemon = True
        if self._num_workers:
            watch.start()
        try:
            return next(stream)
        finally:
            watch.cancel()

    def _kill(self, worker: int) -> None:
        process, _, row = self._build.in_flight[worker].tolist()
        if row >= 0:
            log.warning("a loader worker took more than %g s at one step; it is killed", self._timeout_s)
            os.kill(process, signal.SIGKILL)

    def _bury(self, steps: Steps, error: Exception, lost: Counter[str]) -> None:
        """Names the samples that dead workers were at, and quarantines those that were lost before.

        The error itself says little: torch's RuntimeError, or a broken connection where a finished batch of the dead
        worker could not be fetched any more; and the code's own errors look the same.

        Raises:
            Exception: the error, when no worker died inside a sample.
            ShardError: workers die at a sample that is not read any more, so for another reason.
        """
        places: list[list[int]] = []
        deadline = time.monotonic() + 2.0  # a broken connection may be seen before the death behind it
        while self._num_workers and not places and time.monotonic() < deadline:
            alive = {child.pid for child in multiprocessing.active_children()}
            places = [place for place in self._build.in_flight.tolist() if place[0] >= 0 and place[0] not in alive]
            if isinstance(error, RuntimeError):
                break
            time.sleep(0.02)
        if not places:
            raise error
        for _, at, row in places:
            rows = steps.rows(at, self._rank, self._world)
            key = self._build.sources[rows.source].key(row)
            lost[key] += 1
            if lost[key] > _LOSSES:
                raise ShardError(f"{lost[key]} loader workers were lost at {key}, although it is masked") from error
            log.warning("a loader worker was lost at sample %s; it is started again", key)
            if lost[key] > 1:
                self._build.quarantine.add(key, rows.epoch, at, "a loader worker was lost at it twice")
