"""What `gve predict` leaves: the embeddings of both sides of every dev pair."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from safetensors.torch import save_file

from gve.items import TrainBatch


class Predictions(L.Callback):
    """Writes predictions.safetensors into trainer.default_root_dir; with several ranks predictions-<rank>.safetensors.

    Tensors `query` and `target`, [N, D] float32 unit rows; metadata `rows`, JSON: N times [source, place among the dev
    rows of the source]. Pairs that could not be read are left out.
    """

    def __init__(self) -> None:
        self._rows: list[tuple[str, int]] = []
        self._pairs: list[torch.Tensor] = []

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: TrainBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        kept = (batch.query.valid & batch.target.valid).nonzero().flatten().tolist()
        self._pairs.append(outputs[kept].float().cpu())
        self._rows += [(batch.source, batch.rows[row][1]) for row in kept]

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._rows:
            rank_zero_info("no dev pair was embedded: set data.dev_pairs")
            return
        name = f"predictions-{trainer.global_rank}" if trainer.world_size > 1 else "predictions"
        path = Path(trainer.default_root_dir) / f"{name}.safetensors"
        query, target = (side.contiguous() for side in torch.cat(self._pairs).unbind(1))
        draft = path.with_suffix(".tmp")
        save_file({"query": query, "target": target}, draft, {"rows": json.dumps(self._rows)})
        os.replace(draft, path)
        rank_zero_info(f"{len(query)} pairs embedded: {path}")
