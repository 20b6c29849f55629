"""Hard negatives mined again by the model in training, between epochs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.distributed.tensor import DTensor

from gve.callbacks.randomness import undisturbed
from gve.encode.encoder import BackboneEncoder
from gve.inputs import InputBuilder
from gve.items import InputError
from gve.mining import MiningOptions, mine
from gve.model.embedder import VideoEmbedder

_OPTIONS = MiningOptions()


@runtime_checkable
class MiningData(Protocol):
    """What a DataModule with mined negatives offers."""

    @property
    def opened(self) -> Mapping[str, Any]: ...

    @property
    def held_out(self) -> Mapping[str, np.ndarray]: ...

    @property
    def negatives_per_pair(self) -> Mapping[str, int]: ...

    def has_begun(self, epoch: int) -> bool: ...

    def set_negatives(self, epoch: int, path: Path) -> None: ...


class HardNegativeMining(L.Callback):
    """Mines hard negatives anew at the end of an epoch, on all ranks, by the model as the epoch has left it.

    It writes `negatives/epoch_<n>.safetensors` into trainer.default_root_dir; the run's state keeps its digest, so a
    resume goes on with the same negatives. The first epoch has those of data.negatives_file, mined by any prober. A run
    that resumes from a checkpoint of before mines as its next epoch starts, from the same weights.
    It logs `mining/<source>/enough`, the share of pairs with as many negatives as they ask for, and `/positive` and
    `/negative`, mean cosines.

    Args:
        every_n_epochs: how often; 0: never.
        sources: which sources; null: all for which data.negatives asks for negatives, also where pairs have their own.
        options: how negatives are chosen.
        batch_tokens: most tokens of one forward pass, padding included.
        num_workers: loader processes that decode.
    """

    def __init__(
        self,
        every_n_epochs: int = 0,
        sources: list[str] | None = None,
        options: MiningOptions = _OPTIONS,
        batch_tokens: int = 16384,
        num_workers: int = 0,
    ) -> None:
        if every_n_epochs < 0:
            raise InputError(f"mining.every_n_epochs is {every_n_epochs}: use 0 (never) or more")
        self.every_n_epochs, self.sources, self.options = every_n_epochs, sources, options
        self.batch_tokens, self.num_workers = batch_tokens, num_workers
        self._mined = 0  # the epoch that was mined for last

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses what cannot be mined before the run begins."""
        data = getattr(trainer, "datamodule", None)
        if stage == "fit" and self.every_n_epochs and isinstance(data, MiningData):
            counts = data.negatives_per_pair
            if unknown := sorted(set(self.sources or ()) - set(counts)):
                raise InputError(f"mining.sources names {', '.join(unknown)}; the shards hold {', '.join(counts)}")
            if not any(counts[name] for name in self.sources or counts):
                raise InputError("mining.every_n_epochs is set, but data.negatives asks for no hard negatives")

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._mine(trainer, pl_module, trainer.current_epoch)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.max_epochs is not None and trainer.current_epoch + 1 < trainer.max_epochs:
            self._mine(trainer, pl_module, trainer.current_epoch + 1)

    def state_dict(self) -> dict[str, Any]:
        return {"mined": self._mined}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._mined = state_dict["mined"]

    def _mine(self, trainer: L.Trainer, pl_module: L.LightningModule, epoch: int) -> None:
        """Mines for an epoch, if that is due and not done."""
        data = getattr(trainer, "datamodule", None)
        if not self.every_n_epochs or epoch == 0 or epoch % self.every_n_epochs or not isinstance(data, MiningData):
            return
        if self._mined >= epoch or data.has_begun(epoch):
            return
        if not isinstance(pl_module, VideoEmbedder):
            raise TypeError(f"HardNegativeMining mines with a VideoEmbedder, got {type(pl_module).__name__}")
        if any(isinstance(weight, DTensor) for weight in pl_module.parameters()):
            raise InputError("mining.every_n_epochs needs the whole model on each rank: use ddp, or `gve mine`")
        start = time.monotonic()
        counts = data.negatives_per_pair
        with undisturbed():
            encoder = BackboneEncoder(
                pl_module.backbone,
                InputBuilder.from_base(pl_module.base, pl_module.inputs),
                batch_tokens=self.batch_tokens,
                num_workers=self.num_workers,
            )
            mined = mine(
                data.opened,
                encoder,
                Path(trainer.default_root_dir) / "negatives" / f"epoch_{epoch:04d}.safetensors",
                {name: counts[name] for name in self.sources or counts},
                self.options,
                held_out=data.held_out,
                inputs=pl_module.inputs,
            )
        data.set_negatives(epoch, mined.path)
        self._mined = epoch
        if pl_module.device.type == "cuda":
            torch.cuda.empty_cache()
        values = {
            f"mining/{name}/{what}": getattr(summary, what)
            for name, summary in mined.sources.items()
            for what in ("enough", "positive", "negative")
        }
        for logger in trainer.loggers:
            logger.log_metrics(values, trainer.global_step)
        rank_zero_info(
            f"hard negatives: {sum(summary.mined for summary in mined.sources.values()):,} mined for "
            f"{len(mined.sources)} sources in {time.monotonic() - start:.0f} s ({mined.digest})"
        )
