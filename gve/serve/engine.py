"""One model for many requests: they wait in a bounded line and are encoded together by one thread."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future

from gve.encode.encoder import Encoded, Encoder
from gve.items import Item

logger = logging.getLogger(__name__)

WAITING = 32
"""Requests that may wait; the next one is told to come back."""
BATCH_ITEMS = 32
"""Items of small requests that are encoded together."""


class Busy(RuntimeError):
    """The line is full."""


class Engine:
    """An encoder and the thread that alone calls it. Close it, or the thread waits for ever.

    Args:
        encoder: may be slow and need not be thread-safe.
        waiting: requests that may wait.
    """

    def __init__(self, encoder: Encoder, *, waiting: int = WAITING) -> None:
        self.encoder, self.waiting = encoder, waiting
        self._line: deque[tuple[Sequence[Item], Future[Encoded]]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="gve-model", daemon=True)
        self._thread.start()

    async def encode(self, items: Sequence[Item]) -> Encoded:
        """Vectors of the items, as `encoder.encode` gives them; a caller that is cancelled leaves the line.

        Raises:
            Busy: too many requests wait.
        """
        future: Future[Encoded] = Future()
        with self._changed:
            if self._closed or len(self._line) >= self.waiting:
                raise Busy(f"{len(self._line)} requests are waiting for the model: try again")
            self._line.append((items, future))
            self._changed.notify()
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Ends the thread after the work in hand; requests that wait are cancelled."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._line or self._closed)
                if self._closed:
                    for _, future in self._line:
                        future.cancel()
                    return
                taken = [self._line.popleft()]
                room = BATCH_ITEMS - len(taken[0][0])
                while self._line and len(self._line[0][0]) <= room:
                    taken.append(self._line.popleft())
                    room -= len(taken[-1][0])
            self._encode([job for job in taken if job[1].set_running_or_notify_cancel()])

    def _encode(self, jobs: Sequence[tuple[Sequence[Item], Future[Encoded]]]) -> None:
        if not jobs:
            return
        try:
            encoded = self.encoder.encode([item for items, _ in jobs for item in items])
        except Exception as error:  # the boundary of a server that must go on: each request is told of its own
            if len(jobs) > 1:
                for job in jobs:
                    self._encode([job])
                return
            logger.exception("the model failed on a request of %d items", len(jobs[0][0]))
            jobs[0][1].set_exception(error)
            return
        start = 0
        for items, future in jobs:
            rows = slice(start, start + len(items))
            failures = {
                row - start: why for row, why in encoded.failures.items() if row in range(rows.start, rows.stop)
            }
            tokens = None if encoded.tokens is None else encoded.tokens[rows]
            future.set_result(Encoded(encoded.vectors[rows], failures, tokens))
            start = rows.stop
