"""Where the time of a training step goes: seconds in named phases, measured without stopping the device."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class PhaseClock:
    """Adds up the time of phases; a phase inside another is taken out of the outer one.

    On CUDA the marks are events in the stream, and only `read` waits for them; elsewhere they are wall-clock times.
    Off until `start`: a phase then costs a comparison.
    """

    def __init__(self) -> None:
        self._cuda = False
        self._on = self._paused = False
        self._open: list[str] = []
        self._since: torch.cuda.Event | float = 0.0
        self._pieces: list[tuple[str, torch.cuda.Event | float, torch.cuda.Event | float]] = []
        self._tokens: list[tuple[int, torch.Tensor]] = []

    def start(self, device: torch.device) -> None:
        """Begins to measure work on a device, from zero."""
        self.stop()
        self._on, self._cuda = True, device.type == "cuda"

    def stop(self) -> None:
        """Measures no more, and forgets what was not read."""
        self._on, self._paused, self._open = False, False, []
        self._pieces, self._tokens = [], []

    def pause(self) -> None:
        """Measures nothing until `resume`; what was measured stays."""
        self._on, self._open, self._paused = False, [], self._on or self._paused

    def resume(self) -> None:
        """Goes on after a `pause`."""
        self._on, self._paused = self._on or self._paused, False

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The time inside counts as this phase's."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def enter(self, name: str) -> None:
        """Begins a phase, where a block cannot be written around it; `leave` ends the one that began last."""
        if self._on:
            self._turn()
            self._open.append(name)

    def leave(self) -> None:
        """Ends the phase that began last; nothing happens when none is open."""
        if self._open:
            self._turn()
            self._open.pop()

    def count_tokens(self, attention_mask: torch.Tensor) -> None:
        """Notes a batch that the language model is run on, padding and all."""
        if self._on:
            self._tokens.append((attention_mask.numel(), attention_mask.sum()))

    def read(self) -> tuple[dict[str, float], float]:
        """What was measured since the last reading; waits for the device.

        Returns:
            Phase -> seconds, and the share of the language model's tokens that were padding (nan when it did not run).
        """
        seconds: dict[str, float] = defaultdict(float)
        for name, begin, end in self._pieces:
            if isinstance(begin, float) or isinstance(end, float):
                seconds[name] += float(end) - float(begin)  # type: ignore[arg-type]
            else:
                end.synchronize()
                seconds[name] += begin.elapsed_time(end) / 1000
        fed = sum(size for size, _ in self._tokens)
        attended = int(sum(count for _, count in self._tokens))
        self._pieces, self._tokens = [], []
        return dict(seconds), 1 - attended / fed if fed else float("nan")

    def _turn(self) -> None:
        """Ends the piece of the phase that is open, if one is, and begins the next."""
        now = self._now()
        if self._open:
            self._pieces.append((self._open[-1], self._since, now))
        self._since = now

    def _now(self) -> torch.cuda.Event | float:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


CLOCK = PhaseClock()
"""The clock of this process. One, because a phase may begin in autograd's thread, far from any object that holds it."""
