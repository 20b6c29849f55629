"""Small stages and a captioner whose answers are known by hand, for the tests of the synthesis pipeline.

They are named in configurations as `class: synth_stages:Mark`, so worker processes import them from here.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from gve.items import Text
from gve.synth.records import Reject, Reply, Request
from gve.synth.units import Context, Outcome, Row, execution

SCHEMA = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}


def number(row: Row) -> int:
    """The number in a caption like "clip 17"."""
    return int(row["caption"].split()[1])


@dataclass(frozen=True)
class MarkOptions:
    drop_every: int = 5
    pause_s: float = execution(0.0)


class Mark:
    """Measures a row; drops those whose number is a multiple of `drop_every`."""

    Options: ClassVar[type] = MarkOptions
    scope: ClassVar[Any] = "unit"

    def __init__(self, options: MarkOptions, context: Context) -> None:
        self.options = options

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        return {"version": 1}

    def run(self, rows: Iterable[Row]) -> Iterator[Outcome]:
        for row in rows:
            time.sleep(self.options.pause_s)
            if number(row) % self.options.drop_every == 0:
                yield Outcome.drop(row, "quality", "multiple", score=float(number(row)))
            else:
                yield Outcome(row["id"], ({**row, "mark": number(row) % 7},))


@dataclass(frozen=True)
class PickOptions:
    least: int = 1


class Pick:
    """Keeps rows whose mark is at least the `least`; sees the whole run, and reads it twice."""

    Options: ClassVar[type] = PickOptions
    scope: ClassVar[Any] = "run"

    def __init__(self, options: PickOptions, context: Context) -> None:
        self.options = options

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        return {}

    def run(self, rows: Iterable[Row]) -> Iterator[Outcome]:
        total = sum(row["mark"] for row in rows)
        for row in rows:
            if row["mark"] < self.options.least:
                yield Outcome.drop(row, "quality", "low", score=float(row["mark"]))
            else:
                yield Outcome(row["id"], ({**row, "total": total},))


@dataclass(frozen=True)
class TellOptions:
    prompt: str = "What is seen?"


class Tell:
    """Asks for two captions a row, the second again while it is bad; numbers that end in 3 get no caption at all."""

    Options: ClassVar[type] = TellOptions

    def __init__(self, options: TellOptions, context: Context) -> None:
        self.options, self.seed = options, context.seed

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        return {"prompts": {"tell": hashlib.sha256(self.options.prompt.encode()).hexdigest()}}

    def _request(self, row: Row, what: str, seed: int) -> Request:
        parts = (Text(f"{self.options.prompt} {what} {row['caption']}"),)
        return Request(f"{row['id']}/{what}/{seed}", "", parts, SCHEMA, "caption", seed=seed)

    def work(self, row: Row) -> Generator[Sequence[Request], Sequence[Reply], Outcome]:
        first, second = yield [self._request(row, "short", 0), self._request(row, "long", 0)]
        if first.value is None:
            failed = (
                Reject(row["id"], "enrich", "no-caption", detail=first.text),
                Reject(first.id, "enrich", first.error, detail=first.text),
                Reject(second.id, "enrich", "not-used"),
            )
            return Outcome(row["id"], rejects=failed, tried=2)
        attempt = 0
        while second.value["text"].endswith("bad") and attempt < 2:
            attempt += 1
            (second,) = yield [self._request(row, "long", attempt)]
        texts, rejects = [first.value["text"]], []
        if second.value["text"].endswith("bad"):
            rejects.append(Reject(second.id, "enrich", "words", detail=second.text))
        else:
            texts.append(second.value["text"])
        return Outcome(row["id"], ({**row, "texts": texts},), tuple(rejects), 2, len(texts))


@dataclass(frozen=True)
class PairsOptions:
    pass


class Pairs:
    """A text-to-video pair for each text, and a text-to-text pair where there are two."""

    Options: ClassVar[type] = PairsOptions
    scope: ClassVar[Any] = "unit"

    def __init__(self, options: PairsOptions, context: Context) -> None:
        pass

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        return {}

    def run(self, rows: Iterable[Row]) -> Iterator[Outcome]:
        for row in rows:
            shared = {"of": [row["id"]], "provenance": {"stage": "extend", "prompt": "p1", "model": "m1"}}
            texts = row["texts"]
            pairs = [
                {"id": f"t2v:{row['id']}:{place}", "task": "T2V", "query": [{"text": text}], **shared}
                | {"target": [{"video": row["video"]}]}
                for place, text in enumerate(texts)
            ]
            rejects: tuple[Reject, ...] = ()
            if len(texts) == 2:
                pairs.append(
                    {"id": f"t2t:{row['id']}", "task": "T2T", "query": [{"text": texts[0]}], **shared}
                    | {"target": [{"text": texts[1]}]}
                )
            else:
                rejects = (Reject(f"t2t:{row['id']}", "extend", "one-text"),)
            yield Outcome(row["id"], tuple(pairs), rejects, len(pairs) + len(rejects), len(pairs))


@dataclass(frozen=True)
class EchoOptions:
    slots: int = execution(8)
    latency_s: float = execution(0.0)
    log: str = execution("")
    model: str = "echo-1"


class Echo:
    """Answers from the request alone: numbers ending in 3 fail at once, long texts of numbers ending in 7 are bad
    twice and then good, of those ending in 9 always.
    """

    Options: ClassVar[type] = EchoOptions

    def __init__(self, options: EchoOptions) -> None:
        self.options = options
        self.checked = 0

    @property
    def fingerprint(self) -> str:
        return self.options.model

    async def check(self) -> None:
        self.checked += 1

    def _reply(self, request: Request) -> Reply:
        if self.options.log:
            with open(self.options.log, "ab", buffering=0) as log:
                log.write(request.id.encode() + b"\n")
        text = request.parts[0]
        assert isinstance(text, Text)
        last = int(text.text.split()[-1]) % 10
        if last == 3:
            return Reply(request.id, None, "no idea", "no json", 3, 10, 5)
        bad = "/long/" in request.id and ((last == 7 and request.seed < 2) or last == 9)
        said = f"{text.text} {'bad' if bad else 'good'}"
        return Reply(request.id, {"text": said}, said, attempts=1, prompt_tokens=10, completion_tokens=5)

    async def ask(self, requests: Iterable[Request]) -> AsyncIterator[Reply]:
        source, open_requests = iter(requests), set[asyncio.Task[Reply]]()

        async def answer(request: Request) -> Reply:
            await asyncio.sleep(self.options.latency_s)
            return self._reply(request)

        while True:
            while len(open_requests) < self.options.slots:
                request = next(source, None)
                if request is None:
                    break
                open_requests.add(asyncio.create_task(answer(request)))
            if not open_requests:
                return
            done, open_requests = await asyncio.wait(open_requests, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                yield task.result()
