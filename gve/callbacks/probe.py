"""The prober of the Modality Pyramid: scores every unit of the curriculum before each epoch, and keeps the record.

Source: GVE paper, section on Modality Pyramid Curriculum: R_k(t) is the mean cosine of N_p positive pairs of task k; an
off-the-shelf embedder scores before the first epoch, later the model itself as it is at the end of the epoch before.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast, runtime_checkable

import lightning.pytorch as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset

from gve.callbacks.randomness import undisturbed
from gve.encode.encoder import BackboneEncoder, Encoder, Execution
from gve.encode.pretrained import load_encoder, read_checkpoint
from gve.inputs import InputBuilder, InputPolicy
from gve.items import InputError, Pair
from gve.model.embedder import VideoEmbedder

CHUNK = 64  # pairs that are encoded together, on any number of ranks: what shares a batch may change the last bit

CONFIGURED = "configured"
"""Stands for a fingerprint where the scores are those of the configuration."""


@dataclass(frozen=True)
class UnitScore:
    """What a prober says of one unit.

    Args:
        score: mean cosine of the readable pairs, rounded to 1e-6.
        pairs: how many were readable.
        unreadable: why the others were not.
    """

    score: float
    pairs: int
    unreadable: tuple[str, ...] = ()


@runtime_checkable
class CurriculumData(Protocol):
    """What a DataModule with a curriculum offers the probe."""

    curriculum: Any

    def probe_pairs(self, count: int) -> Mapping[str, Dataset[Pair]]: ...

    def wants_scores(self, epoch: int) -> bool: ...

    def set_scores(self, epoch: int, scores: Mapping[str, float]) -> None: ...

    def curriculum_settings(self) -> dict[str, Any]: ...

    def curriculum_record(self, epoch: int) -> dict[str, Any]: ...


class CurriculumProbe(L.Callback):
    """Scores the units of the curriculum before each epoch on all ranks, without disturbing training.

    Every epoch it logs `curriculum/<unit>/score`, `/probability` and `/draws`, `curriculum/sigma`,
    `curriculum/score_spread` (largest minus smallest score), a picture of the mixture over the steps and a table, and
    writes curriculum.json into trainer.default_root_dir; these are written without a prober too. The record is part
    of the checkpoint.

    It acts at the end of the epoch before, so that the checkpoint of that moment holds what the next epoch draws; and,
    where that did not happen, as an epoch starts (the plan is made later, with the first batch). A run killed in here
    repeats it from the same weights and pairs.

    Args:
        prober: who scores before the first epoch: "backbone" (this model with its adapters off), the file of a
            checkpoint of `gve fit`, or the folder or hub name of another Qwen2.5-VL embedder; null for nobody: the
            scores in data.curriculum.scores stand, or all units start alike. Later epochs are scored by the model.
        pairs: pairs of each unit (N_p of the paper, which does not state it), fixed by the seed.
        enabled: whether to score at all; null: if the schedule needs scores and data.curriculum.scores gives none. With
            true a schedule that needs none is scored too, for the record.
        batch_tokens: most tokens of one forward pass, padding included.
        num_workers: loader processes that read and that decode.
    """

    def __init__(
        self,
        prober: str | None = "backbone",
        pairs: int = 256,
        enabled: bool | None = None,
        batch_tokens: int = 16384,
        num_workers: int = 0,
    ) -> None:
        for name, value, least in (
            ("pairs", pairs, 1),
            ("batch_tokens", batch_tokens, 1),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise InputError(f"probe.{name} is {value}: use {least} or more")
        self.prober, self.pairs, self.enabled = prober, pairs, enabled
        self.batch_tokens, self.num_workers = batch_tokens, num_workers
        self._epochs: list[dict[str, Any]] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses a prober that does not exist before the run begins; a resumed run no longer needs it."""
        data = _data_of(trainer)
        if stage != "fit" or data is None or trainer.ckpt_path is not None:
            return
        if self.prober is None or self.prober == "backbone":
            return
        if not self._scores(data):
            rank_zero_warn(f"probe.prober {self.prober} is not used: data.curriculum has scores, or needs none")
        elif Path(self.prober).is_file():
            read_checkpoint(self.prober)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._weigh(trainer, pl_module, trainer.current_epoch)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.max_epochs is not None and trainer.current_epoch + 1 < trainer.max_epochs:
            self._weigh(trainer, pl_module, trainer.current_epoch + 1)

    def state_dict(self) -> dict[str, Any]:
        """The record of all epochs, JSON-able and equal on every rank."""
        return {"epochs": self._epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._epochs = list(state_dict["epochs"])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A run that goes on in another folder takes its record along."""
        data = _data_of(trainer)
        if data is not None and self._epochs:
            self._write(trainer, data)

    def _scores(self, data: CurriculumData) -> bool:
        """Whether anybody is to score in this run."""
        if self.enabled is None:
            return data.curriculum.needs_scores and not data.curriculum.scores
        return self.enabled

    def _weigh(self, trainer: L.Trainer, pl_module: L.LightningModule, epoch: int) -> None:
        """Scores an epoch if that is due, and keeps, writes and logs its record if that is news."""
        data = _data_of(trainer)
        if data is None:
            return
        known = next((kept for kept in self._epochs if kept["epoch"] == epoch), {})
        probed: dict[str, Any] = {name: known[name] for name in ("prober", "pairs", "unreadable") if name in known}
        if self._scores(data) and data.wants_scores(epoch) and (epoch > 0 or self.prober is not None):
            probed = self._probe(trainer, pl_module, data, epoch)
        record = data.curriculum_record(epoch)
        if not probed:
            earlier = self._epochs[-1]["prober"] if self._epochs else CONFIGURED
            probed = {"prober": earlier if record["scores"] else "", "pairs": {}, "unreadable": {}}
        record |= probed
        if record != known:
            self._epochs = [*(kept for kept in self._epochs if kept["epoch"] < epoch), record]
            self._write(trainer, data)
            self._log(trainer, data)

    def _probe(
        self, trainer: L.Trainer, pl_module: L.LightningModule, data: CurriculumData, epoch: int
    ) -> dict[str, Any]:
        """Scores all units for an epoch; who did it, by how many pairs, and how many could not be read."""
        start = time.monotonic()
        bars = trainer.progress_bar_callback is not None and trainer.is_global_zero
        with undisturbed():
            encoder = self.encoder(epoch, pl_module)
            found = score_pairs(encoder, data.probe_pairs(self.pairs), num_workers=self.num_workers, bars=bars)
            fingerprint = encoder.fingerprint
        data.set_scores(epoch, {unit: result.score for unit, result in found.items()})
        if pl_module.device.type == "cuda":
            del encoder
            torch.cuda.empty_cache()  # a prober of the first epoch may have been as large as the model
        seconds = time.monotonic() - start
        pairs = sum(result.pairs for result in found.values())
        rank_zero_info(
            f"curriculum: {pairs:,} pairs of {len(found)} {data.curriculum.unit}s scored in {seconds:.0f} s by "
            f"{self.prober if epoch == 0 else 'the model itself'} ({fingerprint[:12]})"
        )
        for unit, result in found.items():
            if result.unreadable:
                rank_zero_warn(
                    f"curriculum: {len(result.unreadable)} probe pairs of {unit} could not be read and are left out, "
                    f"for example {result.unreadable[0]}"
                )
        return {
            "prober": fingerprint,
            "pairs": {unit: result.pairs for unit, result in found.items()},
            "unreadable": {unit: len(result.unreadable) for unit, result in found.items() if result.unreadable},
        }

    def encoder(self, epoch: int, pl_module: L.LightningModule) -> Encoder:
        """Who scores before an epoch: the prober before the first, the model as it is before others."""
        if not isinstance(pl_module, VideoEmbedder):
            raise TypeError(f"CurriculumProbe scores with a VideoEmbedder, got {type(pl_module).__name__}")
        if epoch == 0 and self.prober is not None and self.prober != "backbone":
            return self._load(self.prober, pl_module)
        own = BackboneEncoder(
            pl_module.backbone,
            InputBuilder.from_base(pl_module.base, pl_module.inputs),
            batch_tokens=self.batch_tokens,
            num_workers=self.num_workers,
        )
        return own.untrained() if epoch == 0 else own

    def _load(self, name: str, pl_module: VideoEmbedder) -> Encoder:
        """Another model, in the dtype and with the kernel of this one; a checkpoint keeps its own input policy."""
        model = pl_module.backbone.model
        base, inputs = "", pl_module.inputs
        if Path(name).is_file():
            record = read_checkpoint(name)["gve"]
            inputs = InputPolicy.from_dict(record["inputs"])
            # The place that the checkpoint names need not exist here; the same weights do.
            base = pl_module.base if record["base_hash"] == pl_module.backbone.base_hash else record["base"]
        return load_encoder(
            name,
            base=base,
            inputs=inputs,
            execution=Execution(
                device=str(pl_module.device),
                dtype=cast(Literal["float32", "bfloat16"], str(model.dtype).removeprefix("torch.")),
                attention=model.language_model.config._attn_implementation,
                batch_tokens=self.batch_tokens,
                num_workers=self.num_workers,
            ),
        )

    def _log(self, trainer: L.Trainer, data: CurriculumData) -> None:
        record, step = self._epochs[-1], trainer.global_step
        for logger in trainer.loggers:
            logger.log_metrics(metrics(record), step)
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                steps = data.curriculum_settings()["steps_per_epoch"]
                logger.experiment.add_figure("curriculum/mixture", mixture_figure(self._epochs, steps), step)
                logger.experiment.add_text("curriculum/table", table(self._epochs), step)
                logger.experiment.add_text("curriculum/prober", record["prober"] or "none", step)

    def _write(self, trainer: L.Trainer, data: CurriculumData) -> None:
        if not trainer.is_global_zero:
            return
        path = Path(trainer.default_root_dir) / "curriculum.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps({**data.curriculum_settings(), "epochs": self._epochs}, indent=1) + "\n")
        os.replace(draft, path)


def score_pairs(
    encoder: Encoder, pairs: Mapping[str, Dataset[Pair]], *, num_workers: int = 0, bars: bool = False
) -> dict[str, UnitScore]:
    """R of every unit: the mean cosine of query and target; a collective where ranks exist, equal on all of them.

    Args:
        encoder: the prober.
        pairs: unit -> its pairs; reading one may raise InputError or OSError, which leaves it out.
        num_workers: loader processes that read.
        bars: show progress bars.

    Raises:
        InputError: no pair of a unit can be read.
        RuntimeError: the encoder gave a value that is not finite for a pair that it could read.
    """
    chunks = [
        (unit, first, min(first + CHUNK, len(cast(Sequence[Pair], pairs[unit]))))
        for unit in sorted(pairs)
        for first in range(0, len(cast(Sequence[Pair], pairs[unit])), CHUNK)
    ]
    rank, world = _share(encoder)
    reader = DataLoader(
        _Reading(pairs, [(unit, number) for unit, *ends in chunks[rank::world] for number in range(*ends)]),
        batch_size=None,
        num_workers=num_workers,
        generator=torch.Generator(),  # else each loader draws its workers' seed from the global generator
    )
    stream = iter(reader)
    found: dict[tuple[str, int], list[float | str]] = {}
    for unit, first, end in chunks[rank::world]:
        read = [next(stream) for _ in range(first, end)]
        found[unit, first] = _cosines(encoder, read, f"probe, {unit}" if bars else "")
    if world > 1:
        parts: list[dict[tuple[str, int], list[float | str]]] = [{} for _ in range(world)]
        dist.all_gather_object(parts, found)
        found = {place: values for part in parts for place, values in part.items()}
    scores = {}
    for unit in sorted(pairs):
        values = [value for place in sorted(found) if place[0] == unit for value in found[place]]
        cosines = [value for value in values if not isinstance(value, str)]
        reasons = tuple(value for value in values if isinstance(value, str))
        if not cosines:
            raise InputError(f"curriculum: no probe pair of {unit} can be read: {reasons[0] if reasons else 'no rows'}")
        scores[unit] = UnitScore(round(math.fsum(cosines) / len(cosines), 6), len(cosines), reasons)
    return scores


def metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """What is logged of an epoch's record, tag -> value."""
    values = {f"{name}/probability": share for name, share in {**record["mixture"], **record["probabilities"]}.items()}
    values |= {f"{unit}/draws": count for unit, count in record["draws"].items()}
    values |= {f"{unit}/score": score for unit, score in record["scores"].items()}
    if record["scores"]:
        values["score_spread"] = max(record["scores"].values()) - min(record["scores"].values())
    if record["sigma"] is not None:
        values["sigma"] = record["sigma"]
    return {f"curriculum/{name}": value for name, value in values.items()}


def mixture_figure(epochs: Sequence[Mapping[str, Any]], steps_per_epoch: int) -> Figure:
    """Shares of the tasks over the steps, stacked from the bottom of the pyramid to its top."""
    tasks = list(epochs[-1]["mixture"])
    ends = [(record["epoch"] + side) * steps_per_epoch for record in epochs for side in (0, 1)]
    shares = [[record["mixture"][task] for record in epochs for _ in (0, 1)] for task in tasks]
    figure = Figure(figsize=(8.0, 4.2), layout="constrained")
    axes = figure.add_subplot()
    colours = colormaps["turbo"](np.linspace(0.08, 0.92, len(tasks)))
    axes.stackplot(ends, shares, labels=tasks, colors=colours, edgecolor="white", linewidth=0.4)
    axes.set(xlabel="step", ylabel="probability", xlim=(ends[0], ends[-1]), ylim=(0, 1))
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", fontsize=9)
    return figure


def table(epochs: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a row for each unit, with score, probability and draws of every epoch."""
    head = ["unit", *(f"epoch {record['epoch']}: R / P / draws" for record in epochs)]
    lines = [head, ["---"] * len(head)]
    for unit in epochs[-1]["probabilities"]:
        cells = [unit]
        for record in epochs:
            score = f"{record['scores'][unit]:.4f}" if unit in record["scores"] else "-"
            cells.append(f"{score} / {record['probabilities'][unit]:.4f} / {record['draws'][unit]}")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _data_of(trainer: L.Trainer) -> CurriculumData | None:
    data = getattr(trainer, "datamodule", None)
    return data if isinstance(data, CurriculumData) else None


def _share(encoder: Encoder) -> tuple[int, int]:
    """(rank, ranks) that share the chunks. Every forward of a sharded model needs all ranks: there each does all."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    if isinstance(encoder, BackboneEncoder) and any(isinstance(p, DTensor) for p in encoder.backbone.parameters()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def _cosines(encoder: Encoder, read: Sequence[Pair | str], progress: str) -> list[float | str]:
    """The cosine of each pair, in float64, or why there is none."""
    found: list[float | str] = [one if isinstance(one, str) else math.nan for one in read]
    pairs = {number: one for number, one in enumerate(read) if isinstance(one, Pair)}
    if not pairs:
        return found
    items = [*(pair.query for pair in pairs.values()), *(pair.target for pair in pairs.values())]
    encoded = encoder.encode(items, progress=progress)
    query, target = np.split(encoded.vectors.astype(np.float64), 2)
    for at, (number, pair) in enumerate(pairs.items()):
        reason = encoded.failures.get(at) or encoded.failures.get(at + len(pairs))
        cosine = float(query[at] @ target[at])
        if not reason and not math.isfinite(cosine):
            raise RuntimeError(f"the prober gave a cosine of {cosine} for {pair.key}, which it could read")
        found[number] = f"{pair.key}: {reason}" if reason else cosine
    return found


class _Reading(Dataset["Pair | str"]):
    """Pairs of several units in one order; what cannot be read is the reason why."""

    def __init__(self, pairs: Mapping[str, Dataset[Pair]], places: Sequence[tuple[str, int]]) -> None:
        self._pairs, self._places = pairs, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> Pair | str:
        unit, at = self._places[number]
        try:
            return self._pairs[unit][at]
        except (InputError, OSError) as error:
            return str(error)
