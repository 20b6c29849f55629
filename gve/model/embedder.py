"""VideoEmbedder: trains the backbone with InfoNCE, one task per step, the same 15 lines on every rank and level."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import lightning.pytorch as L
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig

import gve
from gve.inputs import InputPolicy
from gve.items import EmbedBatch, InputError, TrainBatch
from gve.model.backbone import Backbone, Lora, check_same_weights
from gve.model.gradcache import embed_groups, grad_cache, groups_of
from gve.model.infonce import Contrast, HardNegatives, InfoNCE, info_nce
from gve.model.sharding import shard

GROUP_PADDING = 1 / 16
"""Padding of rows that run together, at most, as a share of their side. Smaller groups keep a device less busy."""
DevKey = tuple[str, int, int]
"""(source, pass, position) of a dev pair."""


@dataclass(frozen=True)
class Optimizer:
    """AdamW and its schedule (paper: lr 3e-5, weight decay 0.1, cosine; warm-up is not stated, so it is off).

    Args:
        lr: peak learning rate.
        weight_decay: of all trained weights.
        betas: of Adam's moving means.
        warmup_fraction: share of the run's steps in which the rate rises linearly from 0.
        schedule: after warm-up, "cosine" falls to 0 at the last step, "constant" stays.
    """

    lr: float = 3e-5
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_fraction: float = 0.0
    schedule: Literal["cosine", "constant"] = "cosine"

    def __post_init__(self) -> None:
        if not self.lr > 0 or not 0 <= self.warmup_fraction < 1:
            raise InputError(f"{self}: lr must be > 0 and warmup_fraction in [0, 1)")

    def rate(self, step: int, num_steps: int) -> float:
        """The learning rate of a step as a share of `lr`."""
        warmup = self.warmup_fraction * num_steps
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if self.schedule == "constant":
            return 1.0
        return (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1.0, num_steps - warmup)))) / 2


_INPUTS, _LORA, _OPTIMIZER = InputPolicy(), Lora(), Optimizer()


class VideoEmbedder(L.LightningModule):
    """General Video Embedder (arXiv 2510.27571).

    Args:
        base: hub name, local folder, config file or named architecture of a Qwen2.5-VL.
        inputs: how items become model input; saved with every checkpoint.
        lora: adapters to train; null to only evaluate the base.
        dtype: of the frozen base: "float32", or "bfloat16" together with `trainer.precision: bf16-mixed`.
        attention: kernel: "sdpa", "eager" or "flash_attention_2".
        temperature: of InfoNCE.
        false_negative_margin: drop negatives whose cosine is above the positive's by more than this; null: keep all.
        symmetric: both directions of the loss count (the paper's); false: query to target alone.
        optimizer: AdamW and its schedule.
        gradient_checkpointing: recompute the language model's layers in backward.
        chunk_tokens: GradCache: tokens (padding included) that a rank runs through the language model at a time, with
            the same loss and gradients; the price is a second forward. It decides the memory of a step in place of the
            batch size. 0: all at once.
        loss_tile: columns of the loss's cosines that exist at a time; 0: all. Worth it beyond some 16,000 pairs.
        feature_cache_mb: host memory for vision features of clips that epochs repeat, in MiB; 0 for none. On CPU a kept
            feature is bit-equal to a new one (tested); a GPU may choose its kernel by the other clips of the call.
        from_scratch: random base weights, for tests.
    """

    backbone: Backbone

    def __init__(
        self,
        base: str,
        inputs: InputPolicy = _INPUTS,
        lora: Lora | None = _LORA,
        dtype: Literal["float32", "bfloat16"] = "float32",
        attention: str = "sdpa",
        temperature: float = 0.03,
        false_negative_margin: float | None = None,
        symmetric: bool = True,
        optimizer: Optimizer = _OPTIMIZER,
        gradient_checkpointing: bool = False,
        chunk_tokens: int = 0,
        loss_tile: int = 0,
        feature_cache_mb: int = 0,
        from_scratch: bool = False,
    ) -> None:
        super().__init__()
        if chunk_tokens < 0:
            raise InputError(f"chunk_tokens {chunk_tokens} must be >= 0 (0: no chunks)")
        if chunk_tokens and lora is not None and lora.tower:
            raise InputError("lora.tower and chunk_tokens exclude each other: GradCache takes the tower as constant")
        self.base = base
        self.inputs = inputs
        self.lora = lora
        self.contrast = Contrast(temperature, false_negative_margin, loss_tile, symmetric)
        self.chunk_tokens = chunk_tokens
        self.optimizer_settings = optimizer
        self._build_backbone = partial(
            Backbone.from_pretrained,
            base,
            lora=lora,
            dtype=dtype,
            attention=attention,
            from_scratch=from_scratch,
            gradient_checkpointing=gradient_checkpointing,
            feature_cache_bytes=feature_cache_mb << 20,
        )
        # A checkpoint holds the trained weights only; on_load_checkpoint is strict about exactly those.
        self.strict_loading = False
        self._dev_rows: dict[DevKey, dict[str, torch.Tensor]] = {}
        self._loaded_step = 0

    @property
    def trained_steps(self) -> int:
        """Completed optimizer steps behind the weights, also where a checkpoint was loaded to be evaluated."""
        return max(self.trainer.global_step, self._loaded_step)

    def configure_model(self) -> None:
        """Builds the backbone once; not in `__init__`, so that a configuration can be printed without weights."""
        if not hasattr(self, "backbone"):
            self.backbone = self._build_backbone()
            if self.device_mesh is not None:
                shard(self.backbone, self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW over what trains, the rate set per optimizer step."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if not trained:
            raise InputError("nothing trains: model.lora is null")
        num_steps = self.trainer.estimated_stepping_batches
        if math.isinf(num_steps):
            raise InputError("the length of the run is unknown; set trainer.max_epochs and data.steps_per_epoch")
        settings = self.optimizer_settings
        optimizer = torch.optim.AdamW(trained, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: settings.rate(step, int(num_steps)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Start-up self-check on the terminal, rank 0."""
        # Lightning warns of modules in eval mode; here they are the frozen tower, and the lines below say so.
        warnings.filterwarnings("ignore", message=r".*module\(s\) in eval mode at the start of training.*")
        data_lines = getattr(getattr(self.trainer, "datamodule", None), "describe", list)
        for line in (*self.describe(), *data_lines()):
            rank_zero_info(line)

    def describe(self) -> list[str]:
        """The backbone's lines and the input policy's."""
        policy, chunks, tile = self.inputs, self.chunk_tokens, self.contrast.tile
        return [
            *self.backbone.describe(),
            f"positions rule: {policy.positions}; pooled token is the "
            f"{'appended <|endoftext|>' if policy.append_eos else 'end of the generation prompt'}",
            f"tokens: at most {policy.max_frame_tokens} a frame before temporal merging, {policy.max_length} an input; "
            f"frames {policy.sampling}",
            f"a step: {f'GradCache, {chunks} tokens at a time' if chunks else 'all rows at once'}, the loss "
            f"{f'in tiles of {tile} columns' if tile else 'whole'}, temperature {self.contrast.temperature}",
        ]

    def forward(self, batch: EmbedBatch) -> torch.Tensor:
        """Embeds B items: [B, D] float32 unit rows."""
        return self.backbone(batch)

    def training_step(self, batch: TrainBatch, batch_idx: int) -> torch.Tensor:
        """One contrastive step over the pairs of all ranks."""
        result = self.contrasted(batch)
        self._log_training(result, len(batch))
        return result.loss

    def contrasted(self, batch: TrainBatch) -> InfoNCE:
        """The loss over the pairs of all ranks, to call backward on, and what is watched of it."""
        # LoRA dropout is drawn from the plan's seed of this step: a replay is exact.
        torch.manual_seed(batch.seed)
        sides = [side for side in (batch.negatives, batch.query, batch.target) if side is not None]
        features = self.backbone.media_features(*sides, max_tokens=self.chunk_tokens)
        embed, loss = partial(self.backbone, features=features), partial(self._loss, batch)
        if not self.chunk_tokens:
            # With sharded weights every forward is a collective, so all ranks need as many: one for each side.
            padding = math.inf if self.backbone.shards else GROUP_PADDING
            return loss(*embed_groups(embed, groups_of(sides, padding)))
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return grad_cache(embed, sides, loss, trained, max_tokens=self.chunk_tokens, seed=batch.seed)

    def validation_step(self, batch: TrainBatch, batch_idx: int) -> None:
        """Keeps the embeddings of dev pairs; the epoch's end compares each source's pairs at once."""
        query, target = self.backbone(batch.query).cpu(), self.backbone(batch.target).cpu()
        valid = (batch.query.valid & batch.target.valid).tolist()
        for row in range(len(batch)):
            if valid[row]:
                self._dev_rows[(batch.source, *batch.rows[row])] = {
                    "query": query[row],
                    "target": target[row],
                    "ids": torch.stack([batch.query.content_ids[row], batch.target.content_ids[row]]).cpu(),
                }

    def on_validation_epoch_end(self) -> None:
        """Logs val/loss and val/recall_at_1, the means over the sources, and both for each source."""
        self._log_dev("val")

    def test_step(self, batch: TrainBatch, batch_idx: int) -> None:
        """As `validation_step`."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """As `on_validation_epoch_end`, under test/."""
        self._log_dev("test")

    def predict_step(self, batch: EmbedBatch | TrainBatch, batch_idx: int) -> torch.Tensor:
        """Embeds B items, [B, D], or both sides of B pairs, [B, 2, D]: float32 unit rows."""
        if isinstance(batch, EmbedBatch):
            return self.backbone(batch)
        return torch.stack([self.backbone(batch.query), self.backbone(batch.target)], 1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the trained weights only, and says what they belong to."""
        trained = {f"backbone.{name}" for name in self.backbone.trainable_state()}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        checkpoint["gve"] = {
            "version": gve.__version__,
            "base": self.base,
            "base_hash": self.backbone.base_hash,
            "inputs": self.inputs.to_dict(),
            "lora": _lora_dict(self.lora),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses weights of another base, other adapters or another program.

        Raises:
            InputError: says what differs.
        """
        record = checkpoint.get("gve")
        if record is None:
            raise InputError("the checkpoint was not written by gve: it names no base and no input policy")
        if record["base_hash"] != self.backbone.base_hash:
            raise InputError(
                f"the checkpoint was trained on base {record['base']!r} (hash {record['base_hash'][:12]}), "
                f"not on {self.base!r} (hash {self.backbone.base_hash[:12]})"
            )
        ours, theirs = _lora_dict(self.lora), record["lora"]
        if _without_dropout(ours) != _without_dropout(theirs):
            raise InputError(f"the checkpoint's lora is {theirs}, this model's is {ours}")
        expected = {f"backbone.{name}": value.shape for name, value in self.backbone.trainable_state().items()}
        check_same_weights(expected, checkpoint["state_dict"])
        inputs = self.inputs.to_dict()
        changed = [
            f"{name} {old!r} -> {inputs[name]!r}" for name, old in record["inputs"].items() if inputs[name] != old
        ]
        self._loaded_step = checkpoint["global_step"]
        if changed:
            rank_zero_warn(f"inputs differ from those the checkpoint was trained with: {', '.join(changed)}")

    def _loss(self, batch: TrainBatch, *embeddings: torch.Tensor) -> InfoNCE:
        """The loss of a batch whose negatives (if it has any), queries and targets have these embeddings."""
        *hard, query, target = embeddings
        negatives = None
        if batch.negatives is not None:
            ids, valid = batch.negatives.content_ids, batch.negatives.valid
            negatives = HardNegatives(hard[0], batch.negative_index, ids, valid)
        return info_nce(
            query,
            target,
            self.contrast,
            negatives=negatives,
            content_ids=(batch.query.content_ids, batch.target.content_ids),
            valid=batch.query.valid & batch.target.valid,
        )

    def _log_dev(self, stage: str) -> None:
        """All dev pairs of a source are compared at once: neither batch size nor the number of ranks matters."""
        rows = _merge_ranks(self._dev_rows)
        self._dev_rows = {}
        by_source: dict[str, list[dict[str, torch.Tensor]]] = defaultdict(list)
        for key in sorted(rows):
            by_source[key[0]].append(rows[key])
        values: dict[str, list[float]] = defaultdict(list)
        for source, pairs in by_source.items():
            query, target, ids = (torch.stack([pair[name] for pair in pairs]) for name in ("query", "target", "ids"))
            loss = info_nce(
                query, target, Contrast(self.contrast.temperature), content_ids=(ids[:, 0], ids[:, 1]), gather=False
            ).mean_loss
            for what, value in (("loss", float(loss)), ("recall_at_1", _recall_at_1(query, target, ids))):
                values[what].append(value)
                self.log(f"{stage}/{source}/{what}", value, sync_dist=True)
        for what, each in values.items():
            self.log(f"{stage}/{what}", sum(each) / len(each), prog_bar=True, sync_dist=True)

    def _log_training(self, result: InfoNCE, rows: int) -> None:
        # Already reduced over the ranks: every rank logs the same value, no second collective.
        self.log("train/loss", result.mean_loss, prog_bar=True, batch_size=rows)
        for name in ("mean_relevance", "mean_positive", "max_negative_gap", "accuracy"):
            self.log(f"train/{name}", getattr(result, name), batch_size=rows)


def _recall_at_1(query: torch.Tensor, target: torch.Tensor, ids: torch.Tensor) -> float:
    """Recall@1 of the queries over the distinct targets, exact: of K tied at the top with p right, p / K counts.

    Right are the targets of equal content, and those of queries of equal content.
    """
    cosines = query @ target.T
    first = torch.stack([(ids[:, 1] == own).nonzero()[0, 0] for own in ids[:, 1]]).unique()
    same_target = ids[:, None, 1] == ids[None, first, 1]
    same_query = (ids[:, None, 0] == ids[None, :, 0]).float()
    right = (same_query @ same_target.float()) > 0
    cosines = cosines[:, first]
    top = cosines == cosines.amax(1, keepdim=True)
    return float(((top & right).sum(1) / top.sum(1)).mean())


def _merge_ranks(rows: dict[DevKey, dict[str, torch.Tensor]]) -> dict[DevKey, dict[str, torch.Tensor]]:
    """Rows of all ranks; a pair that several ranks saw counts once. As objects: ranks may hold unequal numbers."""
    if not (dist.is_available() and dist.is_initialized()):
        return rows
    parts: list[dict[DevKey, dict[str, torch.Tensor]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, rows)
    return {key: row for part in parts for key, row in part.items()}


def _lora_dict(lora: Lora | None) -> dict[str, Any] | None:
    # Lists, not tuples: equal before and after a file.
    return None if lora is None else {**asdict(lora), "targets": sorted(lora.targets)}


def _without_dropout(lora: Mapping[str, Any] | None) -> dict[str, Any] | None:
    # Checkpoints of before `tower` existed have none.
    return None if lora is None else {k: v for k, v in {"tower": False, **lora}.items() if k != "dropout"}
