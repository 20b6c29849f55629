"""Asks a captioner about many rows at once: one stream of requests over all work units that this process has claimed.

A server is kept busy by questions that wait for it, not by threads: rows are begun only when the captioner takes a
further request, and what a row asks in a second round goes before new rows, so rows end soon and few are open.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Protocol

from gve.synth.records import Captioner, Reply, Request
from gve.synth.units import AskingStage, Outcome, Row, Usage


class Journal(Protocol):
    """Keeps replies while their row is open."""

    def recall(self, row: str, request: str) -> Reply | None:
        """The reply to a request of a row, had before a kill; None if there is none."""

    def keep(self, row: str, reply: Reply) -> None:
        """Notes a new reply."""


class _Talk:
    """One row's questions and answers."""

    def __init__(self, row: Row, work: Generator[Sequence[Request], Sequence[Reply], Outcome]) -> None:
        self.id: str = row["id"]
        self.work = work
        self.asked: Sequence[Request] = ()
        self.replies: dict[str, Reply] = {}
        self.usage = Usage()

    def go_on(self) -> Outcome | None:
        """Hands the replies over; the outcome if the row has come to its end, else `asked` holds new requests."""
        answers = [self.replies[request.id] for request in self.asked]
        for id in dict.fromkeys(request.id for request in self.asked):  # equal requests of a round were asked once
            self.usage += Usage.of(self.replies[id])
        self.replies = {}
        try:
            self.asked = self.work.send(answers) if self.asked else next(self.work)
        except StopIteration as end:
            return replace(end.value, usage=self.usage)
        return None


async def converse(
    stage: AskingStage, captioner: Captioner, rows: Iterable[Row], journal: Journal, emit: Callable[[Outcome], None]
) -> None:
    """Works on rows until all have their outcome.

    Args:
        stage: what is asked.
        captioner: who answers; its own bound on open requests is the concurrency.
        rows: drawn as the captioner takes requests.
        journal: of replies.
        emit: called with each outcome, in any order.

    Raises:
        RuntimeError: the captioner broke its contract: a reply to no request, or none to one.
    """
    waiting: dict[str, _Talk] = {}
    ready: deque[Request] = deque()
    source = iter(rows)

    def proceed(talk: _Talk) -> None:
        """Goes on with a row whose replies are all there, as far as the journal knows the next ones."""
        while True:
            outcome = talk.go_on()
            if outcome is not None:
                emit(outcome)
                return
            fresh = []
            for request in {request.id: request for request in talk.asked}.values():
                reply = journal.recall(talk.id, request.id)
                if reply is None:
                    fresh.append(request)
                else:
                    talk.replies[request.id] = reply
            for request in fresh:
                if request.id in waiting:
                    raise ValueError(f"two rows ask a request of one id: {request.id}")
                waiting[request.id] = talk
            ready.extend(fresh)
            if fresh:
                return

    def requests() -> Iterator[Request]:
        while True:
            if ready:
                yield ready.popleft()
                continue
            row = next(source, None)
            if row is None:
                return
            proceed(_Talk(row, stage.work(row)))

    while True:
        stream: Any = captioner.ask(requests())
        async with aclosing(stream) as replies:
            async for reply in replies:
                talk = waiting.pop(reply.id, None)
                if talk is None:
                    raise RuntimeError(f"the captioner answered {reply.id}, which nobody asks or which has its answer")
                journal.keep(talk.id, reply)
                talk.replies[reply.id] = reply
                if all(request.id in talk.replies for request in talk.asked):
                    proceed(talk)
        # Rounds that were asked for after the last row had been begun.
        if not ready:
            break
    if waiting:
        raise RuntimeError(f"the captioner left {len(waiting)} requests unanswered, for example {next(iter(waiting))}")
