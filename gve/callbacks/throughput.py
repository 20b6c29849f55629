"""How fast a run trains, and how much of that time it waits for data."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as L

from gve.items import TrainBatch


class Throughput(L.Callback):
    """Logs `throughput/pairs_per_s`, `throughput/tokens_per_s` and `throughput/data_wait_share` in fit.

    Means over the steps since the last logged one, of this rank times the number of ranks; time between epochs, in
    validation and in checkpoints is left out. Tokens are those that are attended to, queries, targets and negatives
    together. The wait is the share of the time from the end of one step to the begin of the next.
    """

    def __init__(self) -> None:
        self._clear()
        self._ended: float | None = None
        self._begun = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._clear()
        self._ended = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._begun = time.perf_counter()
        # The first batch of an epoch waits for the loader's start, which is no property of a step.
        if self._ended is not None:
            self._waited_s += self._begun - self._ended

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: TrainBatch, batch_idx: int
    ) -> None:
        self._ended = time.perf_counter()
        self._worked_s += self._ended - self._begun
        self._pairs += len(batch)
        sides = (batch.query, batch.target, batch.negatives)
        self._tokens.extend(side.attention_mask.sum() for side in sides if side is not None)
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by Lightning's logger connector
        if every and trainer.global_step % every == 0:
            seconds = self._worked_s + self._waited_s
            values = {
                "pairs_per_s": self._pairs * trainer.world_size / seconds,
                "tokens_per_s": int(sum(self._tokens)) * trainer.world_size / seconds,
                "data_wait_share": self._waited_s / seconds,
            }
            for logger in trainer.loggers:
                logger.log_metrics({f"throughput/{name}": value for name, value in values.items()}, trainer.global_step)
            self._clear()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Validation inside an epoch is no wait for data.
        self._ended = None

    def _clear(self) -> None:
        self._pairs = 0
        self._tokens: list[Any] = []
        self._worked_s = self._waited_s = 0.0
