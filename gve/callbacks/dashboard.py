"""The TensorBoard page of a run: hyperparameters, the custom scalars page, learning rate and gradient norm.

One run is one TensorBoard run, `tensorboard/`; `gve validate` and `gve test` of it write `tensorboard/validate` and
`tensorboard/test`, so that a full evaluation does not fall among the points of the fit's curves. Every step is the
number of completed optimizer steps; only rank 0 writes; what an attempt logged after its last checkpoint is taken back
when the run goes on from there.

- `train/`: loss, mean_relevance, mean_positive, max_negative_gap, accuracy, learning_rate, grad_norm
- `val/`: loss and recall_at_1 of the dev split, and `val/<source>/` both
- `uvrb/<set>/<metric>`, `uvrb/ability/<name>`, `uvrb/radar`
- `curriculum/<unit>/`: score, probability, draws; `curriculum/` sigma, score_spread, and a picture of the mixture
- `mining/<source>/`: enough, positive, negative
- `throughput/`: pairs, tokens, seconds by phase, waiting, memory
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2
from tensorboard.plugins.hparams.summary_v2 import HParam, Metric, hparams_config_pb, hparams_pb
from torch.nn.utils import get_total_norm

from gve.eval.uvrb import ABILITIES, AVERAGES
from gve.model.embedder import VideoEmbedder

LAYOUT: dict[str, dict[str, list[Any]]] = {
    "1 training": {
        "loss": ["Multiline", [r"train/loss$", r"val/loss$"]],
        "right at rank 1": ["Multiline", [r"train/accuracy$", r"val/recall_at_1$"]],
        "cosines": ["Multiline", [r"train/mean_positive$", r"train/mean_relevance$", r"train/max_negative_gap$"]],
        "learning rate": ["Multiline", [r"train/learning_rate$"]],
        "gradient norm": ["Multiline", [r"train/grad_norm$"]],
        "dev loss by source": ["Multiline", [r"val/[^/]+/loss$"]],
        "dev recall@1 by source": ["Multiline", [r"val/[^/]+/recall_at_1$"]],
    },
    "2 UVRB": {
        "averages": ["Multiline", [rf"uvrb/ability/({'|'.join(AVERAGES)})$"]],
        "abilities": ["Multiline", [rf"uvrb/ability/({'|'.join(ABILITIES)})$"]],
        "sets": ["Multiline", [r"uvrb/(?!ability/)[^/]+/(recall|precision)_at_\d+$"]],
    },
    "3 curriculum": {
        "score": ["Multiline", [r"curriculum/[^/]+/score$"]],
        "probability": ["Multiline", [r"curriculum/[^/]+/probability$"]],
        "draws": ["Multiline", [r"curriculum/[^/]+/draws$"]],
        "sigma and spread of the scores": ["Multiline", [r"curriculum/sigma$", r"curriculum/score_spread$"]],
        "pairs with enough negatives": ["Multiline", [r"mining/[^/]+/enough$"]],
    },
    "4 throughput": {
        "pairs a second": ["Multiline", [r"throughput/pairs_per_s$"]],
        "tokens a second": ["Multiline", [r"throughput/tokens_per_s$"]],
        "seconds of a step": ["Multiline", [r"throughput/[a-z]+_s$"]],
        "waiting for data, padding": ["Multiline", [r"throughput/(data_wait|padding)_share$"]],
        "memory, MiB": ["Multiline", [r"throughput/peak_memory_mb$"]],
    },
}
"""Page of the custom scalars: section -> chart -> tags, as regular expressions matched from a tag's begin."""

FINAL = (
    *(("", f"val/{name}") for name in ("loss", "recall_at_1")),
    *(("validate", f"uvrb/ability/{name}") for name in (*AVERAGES, *ABILITIES)),
)
"""(folder below the run's own, tag) of the values whose last ones stand beside the hyperparameters."""


class Dashboard(L.Callback):
    """Writes a run's page into TensorBoard, and has every logger count completed optimizer steps.

    Lightning counts the steps before the one that it logs, and files all of an evaluation under 0; it takes a logged
    value named "step" in place of its own count. The hyperparameters are those that the logger was given
    (`logger.hparams`).
    """

    def __init__(self) -> None:
        self._step_values: dict[str, float | torch.Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for logger in _tensorboards(trainer):
            writer = logger.experiment.file_writer
            if trainer.ckpt_path is not None:
                # Readers drop what is of this step or later and stands before: an attempt that was killed may have
                # logged steps that are now taken again. The curves of this step itself are behind the checkpoint.
                restart = Event(step=trainer.global_step + 1, session_log=SessionLog(status=SessionLog.START))
                writer.add_event(restart)
            logger.experiment.add_custom_scalars(LAYOUT)
            for part in hyperparameters(dict(logger.hparams)):
                writer.add_summary(part)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by Lightning's logger connector
        if trainer.loggers and every and (trainer.global_step + 1) % every == 0:
            # Before clipping, which comes after this hook. DeepSpeed keeps gradients to itself: none are found.
            gradients = [weight.grad for weight in pl_module.parameters() if weight.grad is not None]
            self._step_values = {"train/learning_rate": float(optimizer.param_groups[0]["lr"])}
            if gradients:
                self._step_values["train/grad_norm"] = get_total_norm(gradients)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        pl_module.log("step", float(trainer.global_step))
        if self._step_values:
            values = {tag: float(value) for tag, value in self._step_values.items()}
            self._step_values = {}
            for logger in trainer.loggers:
                logger.log_metrics(values, trainer.global_step)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        _log_trained_steps(trainer, pl_module)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        _log_trained_steps(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for logger in _tensorboards(trainer):
            # A run without an end is shown as one of unknown status: it runs, was killed, or failed.
            logger.experiment.file_writer.add_summary(_finished())
            logger.experiment.flush()


def hyperparameters(values: Mapping[str, Any]) -> tuple[Summary, Summary]:
    """What TensorBoard's page of hyperparameters reads: which there are, with the metrics beside them; and the values.

    Args:
        values: name -> bool, number or string; others are left out.
    """
    plain = {name: value for name, value in values.items() if isinstance(value, (bool, int, float, str))}
    names = [HParam(name) for name in plain]
    metrics = [Metric(tag, group=group) for group, tag in FINAL]
    return hparams_config_pb(names, metrics), hparams_pb(plain)


def _log_trained_steps(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    step = pl_module.trained_steps if isinstance(pl_module, VideoEmbedder) else trainer.global_step
    pl_module.log("step", float(step), sync_dist=True)


def _finished() -> Summary:
    end = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS)
    content = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(session_end_info=end))
    return Summary(value=[Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=content)])


def _tensorboards(trainer: L.Trainer) -> list[TensorBoardLogger]:
    """The trainer's TensorBoard loggers on rank 0, none elsewhere."""
    return [own for own in trainer.loggers if isinstance(own, TensorBoardLogger) and trainer.is_global_zero]
