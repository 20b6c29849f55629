"""What a step of the synthesis is: rows in, one outcome for each, and how it says what decides its answers.

A run is a list of steps: input, scan, select, enrich, extend, output. Each is a Stage, which looks at rows itself, or
an AskingStage, which asks a captioner about them. Rows are JSON objects. What reads and writes them on disk, shares
them among workers and survives a kill is none of a stage's business (gve.synth.folder, gve.synth.pipeline).

A row of the steps from input to enrich is a weak pair, and each step adds fields of its own to it::

    {"id": "webvid:1234", "source": "webvid", "video": <locator>, "caption": "a dog runs",
     "start_s": null, "end_s": null, "meta": {}}

A row that `extend` gives, and `output` writes, is a training pair::

    {"id": "t2v:webvid:1234:0", "task": "T2V", "of": ["webvid:1234"],
     "query": [{"text": "..."}], "target": [{"video": <locator>}], "negatives": [[{"video": <locator>}]],
     "provenance": {"stage": "enrich", "prompt": <sha256>, "model": ..., ...}}

`of` names the weak pairs that it was made from; `negatives` may be absent; `provenance` is stored with the sample. A
locator says where media lie: gve.synth.media.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from gve.synth.records import Reject, Reply, Request

if TYPE_CHECKING:
    from gve.encode.encoder import LoadedEncoder
    from gve.synth.media import MediaStore

Row = dict[str, Any]
"""A JSON object with an `id` that no other row of its step has."""

Scope = Literal["unit", "run"]


@dataclass(frozen=True)
class Usage:
    """What asking cost.

    Args:
        requests: questions.
        attempts: messages sent for them.
        prompt_tokens, completion_tokens: over all attempts, as reported.
    """

    requests: int = 0
    attempts: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @classmethod
    def of(cls, reply: Reply) -> Usage:
        return cls(1, reply.attempts, reply.prompt_tokens, reply.completion_tokens)

    def __add__(self, other: Usage) -> Usage:
        return Usage(*(mine + its for mine, its in zip(asdict(self).values(), asdict(other).values(), strict=True)))


@dataclass(frozen=True)
class Outcome:
    """What became of one row; every row has exactly one.

    The row goes on as `rows` (itself with new fields, or the pairs that were made from it), or it is dropped: then
    there are no rows, and exactly one reject has its id. Parts of it may fail while it goes on: their rejects have ids
    of their own, and the parts that were tried are the ones that were made and those.

    Args:
        id: of the row.
        rows: what the next step gets, each with an id.
        rejects: of the row itself, or of parts of it.
        tried: parts that were tried for this row: captions asked for, pairs planned; 0 where a row has no parts.
        made: parts that came of it.
        usage: what was asked; filled in by the pipeline.
    """

    id: str
    rows: tuple[Row, ...] = ()
    rejects: tuple[Reject, ...] = ()
    tried: int = 0
    made: int = 0
    usage: Usage = Usage()

    @classmethod
    def drop(cls, row: Row, stage: str, reason: str, *, score: float | None = None, detail: str = "") -> Outcome:
        """The row ends here."""
        return cls(row["id"], rejects=(Reject(row["id"], stage, reason, score, detail),))

    def check(self) -> None:
        """Raises ValueError when it does not add up; that is a fault of the stage, not of the data."""
        own = sum(reject.id == self.id for reject in self.rejects)
        if own != (not self.rows):
            raise ValueError(f"outcome of {self.id}: {len(self.rows)} rows and {own} rejects of its own id")
        if self.tried != self.made + len(self.rejects) - own:
            raise ValueError(
                f"outcome of {self.id}: {self.tried} parts tried, {self.made} made, {len(self.rejects) - own} rejected"
            )

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = {"id": self.id, "rows": list(self.rows)}
        if self.rejects:
            values["rejects"] = [asdict(reject) for reject in self.rejects]
        if self.tried:
            values |= {"tried": self.tried, "made": self.made}
        if self.usage != Usage():
            values["usage"] = asdict(self.usage)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Outcome:
        return cls(
            values["id"],
            tuple(values["rows"]),
            tuple(Reject(**reject) for reject in values.get("rejects", ())),
            values.get("tried", 0),
            values.get("made", 0),
            Usage(**values.get("usage", {})),
        )


@dataclass(frozen=True)
class Context:
    """What a stage may use beside its options.

    Args:
        media: pictures and clips that stages cut, kept with the run.
        seed: of every choice: key draws by (seed, row id, ...), never by order.
        encoder: the configured embedder; loaded at the first call, kept for the process.
        rows: rows that an earlier step gave, by its name; they may be read again and again.
    """

    media: MediaStore
    seed: int
    encoder: Callable[[], LoadedEncoder]
    rows: Callable[[str], Iterable[Row]]


class Stage(Protocol):
    """A step that needs no captioner. Its class is built as `Class(options, context)`.

    Attributes:
        Options: frozen dataclass; its fields are the keys of the step's section in the configuration. Those that decide
            nothing (processes, batch size) are marked by `execution(default)`.
        scope: "unit": `run` sees rows of one or several work units as they are claimed, in any number of processes; it
            must not depend on their order or on what else is in the stream, and what it has answered survives a kill.
            "run": it sees all rows of the run, in order, in one process; `rows` may be read several times; killed, it
            starts again. Such a step should be cheap.
    """

    Options: ClassVar[type]
    scope: ClassVar[Scope]

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """What decides its answers beside its options, in plain values: hashes of prompts, model, sampling.

        A folder that was begun with another value is refused, by name.
        """

    def run(self, rows: Iterable[Row]) -> Iterator[Outcome]:
        """One outcome for each row. Scope "unit": in any order, and rows should be drawn as they are needed.

        Rows that cannot be used are dropped by an outcome. An exception ends the worker.
        """


class AskingStage(Protocol):
    """A step that asks a captioner. Its class is built as `Class(options, context)`; its scope is always "unit".

    It never waits: many rows are worked on at once, so that a server with 64 slots stays busy. What it needs to measure
    (embeddings, similarities) belongs into a Stage before or after it.

    Attributes:
        Options: frozen dataclass; its fields are the keys of the step's section in the configuration.
    """

    Options: ClassVar[type]

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """As of a Stage; the captioner's own fingerprint is added by the pipeline."""

    def work(self, row: Row) -> Generator[Sequence[Request], Sequence[Reply], Outcome]:
        """Asks about one row: yields requests, is sent their replies in the same order, and returns the outcome.

        It may ask in several rounds, for example again with another seed where a reply breaks a word rule. Request
        ids are unique in the run, so they begin with the row's; an equal id is an equal question, and one that was
        answered before a kill is not asked again. Media are passed on undecoded; a step takes milliseconds.
        """


@dataclass(frozen=True)
class Identity:
    """What a step's results were made with; it is stored with them, and another one is refused.

    Args:
        step: its name.
        fingerprint: of the stage, as plain JSON values.
        after: digest of the step before; empty for the first.
    """

    step: str
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    after: str = ""

    @property
    def digest(self) -> str:
        """Hex SHA-256, first 16 digits."""
        return hashlib.sha256(canonical(asdict(self)).encode()).hexdigest()[:16]


def canonical(value: Any) -> str:
    """JSON with sorted keys and no blanks: equal values give equal texts.

    Raises:
        ValueError, TypeError: the value is not plain JSON (NaN is not).
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def execution(default: Any) -> Any:
    """Default of an option that says how a step runs (processes, batch size) and decides nothing of what it gives."""
    return field(default=default, metadata={"execution": True})


def deciding(options: Any) -> dict[str, Any]:
    """The options of a step that decide what it gives, as plain JSON values."""
    return json.loads(json.dumps(options, default=_plain))


def _plain(value: Any) -> Any:
    if not is_dataclass(value):
        return str(value)
    return {item.name: getattr(value, item.name) for item in fields(value) if not item.metadata.get("execution")}
