"""How fast a run trains, where the time of a step goes, and how much of it waits for data."""

from __future__ import annotations

import resource
import time
from typing import Any

import lightning.pytorch as L
import torch

from gve.items import TrainBatch
from gve.model.clock import CLOCK

PHASES = ("tower", "decoder", "loss", "comm", "optimizer")


class Throughput(L.Callback):
    """Logs `throughput/*` in fit, each over the steps since the last logged one.

    Time between epochs, in validation and in checkpoints is left out.

    - `pairs_per_s`, `tokens_per_s`: of this rank times the number of ranks. Tokens are those that are attended to,
      queries, targets and negatives together, each counted once.
    - `data_wait_share`: share of the time from the end of one step to the begin of the next, the stall for decoding.
    - `padding_share`: share of padding in what the language model was run on.
    - `tower_s`, `decoder_s`, `loss_s`, `comm_s`, `optimizer_s`: seconds of a step in the vision tower, in the language
      model (forward, and all of backward; GradCache's two passes), in the loss, in collectives of the loss and of
      GradCache (waiting for the slowest rank is in it), and in the optimizer. DDP reduces gradients while backward
      runs, so that is in `decoder_s`. On CUDA by events, which do not stop the device.
    - `peak_memory_mb`: on CUDA the largest allocation since the last logged step; elsewhere the largest resident memory
      of the process so far. MiB.
    """

    def __init__(self) -> None:
        self._clear()
        self._ended: float | None = None
        self._begun = 0.0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.loggers and _every(trainer):  # nobody would read it, and it would grow
            CLOCK.start(pl_module.device)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._clear()
        self._ended = None
        CLOCK.read()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._begun = time.perf_counter()
        # The first batch of an epoch waits for the loader's start, which is no property of a step.
        if self._ended is not None:
            self._waited_s += self._begun - self._ended

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: torch.Tensor) -> None:
        CLOCK.enter("decoder")

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        CLOCK.leave()

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        # From here to the end of the step: nothing else is left.
        CLOCK.enter("optimizer")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: TrainBatch, batch_idx: int
    ) -> None:
        CLOCK.leave()
        self._ended = time.perf_counter()
        self._worked_s += self._ended - self._begun
        self._steps += 1
        self._pairs += len(batch)
        sides = (batch.query, batch.target, batch.negatives)
        self._tokens.extend(side.attention_mask.sum() for side in sides if side is not None)
        every = _every(trainer)
        if every and trainer.global_step % every == 0:
            values = self._values(trainer.world_size, pl_module.device)
            for logger in trainer.loggers:
                logger.log_metrics({f"throughput/{name}": value for name, value in values.items()}, trainer.global_step)
            self._clear()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        CLOCK.pause()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Validation inside an epoch is no wait for data.
        self._ended = None
        CLOCK.resume()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        CLOCK.stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        CLOCK.stop()

    def _values(self, world: int, device: torch.device) -> dict[str, float]:
        seconds = self._worked_s + self._waited_s
        phases, padding = CLOCK.read()
        values = {
            "pairs_per_s": self._pairs * world / seconds,
            "tokens_per_s": int(sum(self._tokens)) * world / seconds,
            "data_wait_share": self._waited_s / seconds,
            "padding_share": padding,
            **{f"{name}_s": phases.get(name, 0.0) / self._steps for name in PHASES},
        }
        if device.type == "cuda":
            values["peak_memory_mb"] = torch.cuda.max_memory_allocated(device) / 2**20
            torch.cuda.reset_peak_memory_stats(device)
        else:
            values["peak_memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return values

    def _clear(self) -> None:
        self._steps = self._pairs = 0
        self._tokens: list[Any] = []
        self._worked_s = self._waited_s = 0.0


def _every(trainer: L.Trainer) -> int:
    return trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by Lightning's logger connector
