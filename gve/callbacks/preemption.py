"""A cluster's request to stop: heard by any rank, answered by all of them at the end of the same step."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import lightning.pytorch as L
import torch

PREEMPTED = 85
"""Exit code of a run that was asked to stop, has saved its state and can be started again."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Preemption and time limits come as either: SLURM may send no user signal, only TERM and a grace time."""


class Preempted(SystemExit):
    """Ends a process whose run was asked to stop and has saved its state.

    Args:
        by: name of the signal.
        rank: of the process. Rank 0 exits with PREEMPTED, the others with 0: a launcher that sees one of its
            processes fail kills the rest, rank 0 perhaps before it has said goodbye.
    """

    def __init__(self, by: str, rank: int) -> None:
        super().__init__(PREEMPTED if rank == 0 else 0)
        self.by = by

    def __str__(self) -> str:
        return f"stopped by {self.by}, state saved"


class StopSignals:
    """Notes SIGTERM and SIGUSR1 instead of dying of them; what is noted is agreed on between ranks.

    A handler does nothing but note: saving inside a handler meets the other ranks in another collective and hangs.
    Loader workers inherit the handler by fork and only note it for themselves.
    """

    def __init__(self) -> None:
        self._heard = 0
        self._before: dict[signal.Signals, Any] = {}

    def listen(self) -> None:
        """Takes the signals over from whoever has them now; outside the main thread Python forbids it: nothing."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            before = signal.signal(number, self._note)
            self._before.setdefault(number, before)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # one that came while the program started is heard now

    def leave(self, *, deaf: bool = False) -> None:
        """Gives the signals back; `deaf` ignores them for the rest of the process, which is about to exit."""
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if deaf else (handler or signal.SIG_DFL))
        self._before = {}

    def agreed(self, trainer: L.Trainer, due: bool = False) -> tuple[str, bool]:
        """What holds on any rank. A collective: every rank calls it.

        Args:
            due: something that ranks may see differently, such as the time.

        Returns:
            (name of the signal that was heard, empty if none was; due).
        """
        mine = torch.tensor([self._heard, int(due)], device=trainer.strategy.root_device)
        number, any_due = trainer.strategy.reduce(mine, reduce_op="max").tolist()
        return signal.Signals(number).name if number else "", bool(any_due)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._heard = number
