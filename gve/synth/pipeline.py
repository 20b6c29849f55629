"""The synthesis as a whole: steps one after another, each shared by any number of workers, and what they add up to.

Every worker runs the same loop. In each step it claims units, works on them, and when none is left to claim waits for
the others, or takes over from those that died; the last one to finish a unit makes the step done, and all go on. A
worker that is started later, or again, finds its place by what lies in the run folder.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from gve.data.readers.rows import mark
from gve.items import InputError
from gve.synth.asking import converse
from gve.synth.folder import OpenUnit, Rows, Slice, StepFolder, Tally, encode, rejects, write_durably
from gve.synth.leases import Worker, replace_file, take
from gve.synth.media import MediaStore
from gve.synth.records import Captioner, Reply
from gve.synth.units import AskingStage, Context, Identity, Outcome, Row, Stage, Usage, deciding

if TYPE_CHECKING:  # it imports torch, which most steps do without
    from gve.encode.encoder import LoadedEncoder

RUN, FUNNEL, REJECTS = "run.json", "funnel.json", "rejects.jsonl"
SYNC_S = 1.0
WHOLE = "00000"
"""The only unit of a step that sees the whole run."""


@dataclass(frozen=True)
class RunOptions:
    """How the work is shared; none of it decides what comes out.

    Args:
        workers: processes of this command.
        unit_rows: rows of a work unit: what one worker claims, and what is checked and counted together.
        lease_s: after how many seconds without a sign of life a worker of another machine is taken for dead.
        poll_s: how often a worker that has nothing to do looks again, in seconds.
        price_prompt, price_completion: of a million tokens, in any currency; for the cost in `gve synth status`.
    """

    workers: int = 1
    unit_rows: int = 200
    lease_s: float = 120.0
    poll_s: float = 2.0
    price_prompt: float = 0.0
    price_completion: float = 0.0

    def __post_init__(self) -> None:
        if self.workers < 1 or self.unit_rows < 1 or self.lease_s <= 0 or self.poll_s <= 0:
            raise InputError(
                f"run: {self.workers} workers, {self.unit_rows} rows a unit, lease of {self.lease_s} s, poll every "
                f"{self.poll_s} s: all must be positive"
            )


@dataclass(frozen=True)
class Step:
    """One step of a run.

    Args:
        name: of its folder.
        cls: Stage or AskingStage.
        options: an instance of its Options.
    """

    name: str
    cls: Any
    options: Any

    @property
    def asks(self) -> bool:
        return hasattr(self.cls, "work")

    @property
    def whole(self) -> bool:
        """Whether it sees the whole run at once."""
        return not self.asks and self.cls.scope == "run"


@dataclass(frozen=True)
class Plan:
    """What a run does. It pickles, so that every worker process has the same one.

    Args:
        out: folder of the run.
        steps: in order; the first one reads the sources and is given no rows.
        seed: of every choice.
        captioner: makes the captioner; needed where a step asks.
        encoder: loads the embedder; needed where a step measures.
        run: how the work is shared.
        config: the configuration as it was read, for the record.
        flow: names of all steps of the flow, where `steps` are only the first ones of it; those of `steps` when empty.
    """

    out: Path
    steps: tuple[Step, ...]
    seed: int = 0
    captioner: Callable[[], Captioner] | None = None
    encoder: Callable[[], LoadedEncoder] | None = None
    run: RunOptions = RunOptions()
    config: dict[str, Any] = field(default_factory=dict)
    flow: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Of all steps, also of those that this command does not come to."""
        return self.flow or tuple(step.name for step in self.steps)

    def until(self, name: str) -> tuple[Step, ...]:
        """The steps up to one of them; all when the name is empty.

        Raises:
            InputError: there is no such step.
        """
        names = [step.name for step in self.steps]
        if name and name not in names:
            raise InputError(f"no step {name!r}: use one of {', '.join(names)}")
        return self.steps[: names.index(name) + 1] if name else self.steps


class Workshop:
    """What a worker process keeps from step to step: the embedder, the captioner and its event loop.

    Use as a context manager.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._encoder: LoadedEncoder | None = None
        self._captioner: Captioner | None = None
        self._stack = ExitStack()
        self._runner: asyncio.Runner | None = None
        self.context = Context(
            MediaStore(plan.out), plan.seed, self._load_encoder, lambda step: Rows(StepFolder(plan.out, step).slices())
        )

    def __enter__(self) -> Workshop:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _load_encoder(self) -> LoadedEncoder:
        if self._encoder is None:
            if self._plan.encoder is None:
                raise InputError("this run measures similarities: name an embedder by `encoder: {model: ...}`")
            self._encoder = self._plan.encoder()
        return self._encoder

    @property
    def captioner(self) -> Captioner:
        """Made, and probed, when a step first asks."""
        if self._captioner is None:
            if self._plan.captioner is None:
                raise InputError("this run asks a captioner: name one by `captioner: {kind: ...}`")
            self._captioner = self._plan.captioner()
        return self._captioner

    def converse(self, stage: AskingStage, desk: Desk) -> None:
        """Works on the rows of a desk by asking.

        One event loop serves the whole life of the process: a client's connections belong to the loop they began in.
        """
        if self._runner is None:
            self._runner = self._stack.enter_context(asyncio.Runner())
            self._runner.run(self.captioner.check())
        self._runner.run(converse(stage, self.captioner, desk.rows(), desk, desk.emit))


class Desk:
    """The open units of one worker in one step. Use as a context manager.

    Whatever waits for the disk (syncing, finishing a unit) is done by one thread in order: on a busy file system it
    takes a tenth of a second, in which a server would run dry.

    Args:
        folder: of the step.
        units: name -> what goes in, in the order in which this worker takes them.
        worker: who works.
    """

    def __init__(self, folder: StepFolder, units: dict[str, Slice], worker: Worker) -> None:
        self._folder, self._units, self._worker = folder, units, worker
        self._open: dict[str, OpenUnit] = {}
        self._disk = ThreadPoolExecutor(1, "disk")
        self._waiting: deque[Future[None]] = deque()
        self._synced = time.monotonic()
        self.finished = 0

    def __enter__(self) -> Desk:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._disk.shutdown()
        for unit in set(self._open.values()):
            unit.close()
        if kind is None:
            self._check_disk()
            self._check_empty()

    def rows(self) -> Iterator[Row]:
        """Rows without an outcome, of units claimed one after another, until there is none left to claim."""
        while claim := take(self._folder.path, list(self._units), self._worker):
            self.finished += 1  # or lost to another worker, which finishes it
            if (self._folder.path / f"{claim.unit}.jsonl").exists():  # its owner died just before the manifest
                self._folder.seal(claim.unit)
                continue
            unit = OpenUnit(claim, self._units[claim.unit].rows())
            self._open.update({row["id"]: unit for row in unit.pending})
            self._finish_if_whole(unit)
            yield from unit.pending

    def recall(self, row: str, request: str) -> Reply | None:
        return self._open[row].replies.get(request)

    def keep(self, row: str, reply: Reply) -> None:
        self._open[row].keep(reply)
        self._sync()

    def emit(self, outcome: Outcome) -> None:
        """Notes an outcome; finishes its unit when it is the last one.

        Raises:
            ValueError: it is of no open row, or does not add up.
            OSError: the disk is full.
        """
        unit = self._open.pop(outcome.id, None)
        if unit is None:
            raise ValueError(f"step {self._folder.step}: an outcome of no open row: {outcome.id}")
        unit.add(outcome)
        self._worker.count()
        self._sync()
        self._finish_if_whole(unit)

    def _finish_if_whole(self, unit: OpenUnit) -> None:
        if unit.whole:
            self._waiting.append(self._disk.submit(unit.finish, self._folder))

    def _sync(self) -> None:
        """Now and then; a kill loses nothing that was written, a power cut at most SYNC_S of a worker's lines."""
        if time.monotonic() - self._synced > SYNC_S:
            self._synced = time.monotonic()
            self._waiting.extend(self._disk.submit(unit.sync) for unit in set(self._open.values()))
            self._check_disk()

    def _check_disk(self) -> None:
        """Raises what went wrong in the thread."""
        while self._waiting and self._waiting[0].done():
            self._waiting.popleft().result()

    def _check_empty(self) -> None:
        """Raises RuntimeError when rows were taken and not answered."""
        if self._open:
            row = next(iter(self._open))
            raise RuntimeError(
                f"step {self._folder.step} left {len(self._open)} rows without an outcome, for example {row}"
            )


def work(plan: Plan, until: str = "", share: float = 0.0) -> None:
    """Works as one worker of a run until all its steps are done, by this worker or others.

    Args:
        plan: the run.
        until: last step; all when empty.
        share: in [0, 1): where in each step this worker begins, so that workers do not meet at every unit.

    Raises:
        InputError: the input or the folder cannot be used.
        OSError: the disk is full, or the folder went away; what was done is kept.
    """
    with Worker(plan.out, plan.run.lease_s) as worker, Workshop(plan) as workshop:
        after, slices = "", list[Slice]()
        for step in plan.until(until):
            folder = StepFolder(plan.out, step.name)
            if folder.done() is None:
                _do_step(plan, step, folder, slices, after, worker, workshop, share)
            else:
                folder.compare({"options": deciding(step.options)}, after)
            slices = folder.slices()
            identity = folder.identity()
            assert identity is not None
            after = identity.digest


def _do_step(
    plan: Plan,
    step: Step,
    folder: StepFolder,
    slices: list[Slice],
    after: str,
    worker: Worker,
    workshop: Workshop,
    share: float,
) -> None:
    """Works on a step until it is done."""
    fingerprint: dict[str, Any] = {"options": deciding(step.options)}
    folder.compare(fingerprint, after)  # before anything heavy is loaded
    stage = step.cls(step.options, workshop.context)
    fingerprint |= json.loads(json.dumps(dict(stage.fingerprint)))
    if step.asks:
        fingerprint["captioner"] = workshop.captioner.fingerprint
    folder.adopt(Identity(step.name, fingerprint, after))
    worker.begin(step.name)
    names = [WHOLE] if step.whole else [f"{number:05d}" for number in range(len(slices))]
    begin = int(share * len(names))
    units = dict(zip(names, slices, strict=False))
    order = {name: units[name] for name in names[begin:] + names[:begin] if name in units}
    while not folder.close(names):
        if step.whole:
            worked = _do_whole(stage, folder, slices, step is plan.steps[0], worker, plan.run.unit_rows)
        else:
            with Desk(folder, order, worker) as desk:
                if step.asks:
                    workshop.converse(stage, desk)
                else:
                    for outcome in stage.run(desk.rows()):
                        desk.emit(outcome)
            worked = desk.finished > 0
        if not worked:
            time.sleep(plan.run.poll_s)


def _do_whole(
    stage: Stage, folder: StepFolder, slices: list[Slice], first: bool, worker: Worker, unit_rows: int
) -> bool:
    """Works on a step that sees the whole run, if nobody else does; returns whether it did."""
    claim = take(folder.path, [WHOLE], worker)
    if claim is None:
        return False
    if (folder.path / f"{WHOLE}.jsonl").exists():
        folder.seal(WHOLE, unit_rows)
        return True
    rows = Rows(slices)
    draft = folder.path / f".{WHOLE}.{claim.generation}.{worker.id}.tmp"
    write_durably(draft, _checked(stage.run(rows), None if first else rows, worker))
    if claim.held:
        folder.publish(WHOLE, draft, unit_rows)
    draft.unlink(missing_ok=True)
    return True


def _checked(outcomes: Iterable[Outcome], rows: Rows | None, worker: Worker) -> Iterator[bytes]:
    """The lines of outcomes; at the end, that there was exactly one for each row.

    Sums of hashes stand in for a set of ids, which ten million rows would not leave room for.
    """
    count = total = 0
    for outcome in outcomes:
        outcome.check()
        count += 1
        total += mark(outcome.id)
        worker.count()
        yield encode(outcome.to_dict()) + b"\n"
    if rows is not None and (count, total) != (len(rows), sum(mark(row["id"]) for row in rows)):
        raise RuntimeError(f"a step gave {count} outcomes for {len(rows)} rows, or outcomes of other rows")


# ---------------------------------------------------------------------------------------------------------- the numbers


def funnel(out: Path, steps: Iterable[str]) -> dict[str, Any]:
    """How many rows went in and out of each finished step, and why the others did not; sums hold exactly.

    Args:
        out: folder of the run.
        steps: names in order.

    Returns:
        JSON-able: `input`, what was read; `steps`, each with in = out + sum of rejected by reason, `rows` given to the
        next step (its in; more than out where a video becomes several pairs), parts (tried = made + sum of rejected)
        and usage; `rejected` of all steps by "step/reason"; `usage` of all steps.

    Raises:
        RuntimeError: numbers that do not add up: files of the run were changed.
    """
    table: list[dict[str, Any]] = []
    rejected, usage, flow = Counter[str](), Usage(), None
    for name in steps:
        done = StepFolder(out, name).done()
        if done is None:
            break
        tally = Tally.from_dict(done["tally"])
        if tally.rows_in != tally.passed + tally.dropped.total() or tally.tried != tally.made + tally.failed.total():
            raise RuntimeError(f"step {name} of {out} does not add up: {tally}")
        if flow is not None and flow != tally.rows_in:
            raise RuntimeError(f"step {name} of {out} had {tally.rows_in} rows, the step before gave {flow}")
        flow = tally.rows_out
        rejected.update({f"{name}/{reason}": count for reason, count in tally.dropped.items()})
        usage += tally.usage
        table.append(
            {
                "step": name,
                "in": tally.rows_in,
                "out": tally.passed,
                "rejected": dict(tally.dropped.most_common()),
                "rows": tally.rows_out,
                "parts": {"tried": tally.tried, "made": tally.made, "rejected": dict(tally.failed.most_common())},
                "usage": asdict(tally.usage),
            }
        )
    return {
        "input": table[0]["in"] if table else 0,
        "steps": table,
        "rejected": dict(rejected.most_common()),
        "usage": asdict(usage),
    }


def write_reports(plan: Plan) -> dict[str, Any]:
    """Writes funnel.json, and rejects.jsonl with every reject of the finished steps; returns the funnel."""
    numbers = funnel(plan.out, plan.names)
    replace_file(plan.out / FUNNEL, (json.dumps(numbers, indent=1, ensure_ascii=False) + "\n").encode(), durable=True)
    draft = plan.out / f".{REJECTS}.{uuid.uuid4().hex[:12]}.tmp"
    lines = (
        encode({"step": row["step"], **asdict(reject)}) + b"\n"
        for row in numbers["steps"]
        for reject in rejects(StepFolder(plan.out, row["step"]))
    )
    write_durably(draft, lines)
    draft.replace(plan.out / REJECTS)
    return numbers


def write_run(plan: Plan) -> None:
    """Notes in run.json what is run: read by `gve synth status`, decides nothing."""
    record = {
        "steps": list(plan.names),
        "seed": plan.seed,
        "run": asdict(plan.run),
        "config": plan.config,
    }
    try:
        plan.out.mkdir(parents=True, exist_ok=True)
        replace_file(plan.out / RUN, (json.dumps(record, indent=1, default=str) + "\n").encode(), durable=True)
    except OSError as error:
        raise InputError(f"cannot write to {plan.out} ({error.strerror}): choose another --out") from error
