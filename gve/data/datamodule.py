"""PyramidDataModule: the plan, the shards and the loaders behind Lightning's interface."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn

from gve.data.curriculum import TASKS, Curriculum
from gve.data.loader import PADDING_ROW, Quarantine, StepBuilder, StepLoader
from gve.data.negatives import MinedNegatives, digest_of
from gve.data.plan import EpochPlan, PlannedSource, PlanState, Rows, hold_out, key_of, units_of
from gve.data.probe import ProbePairs, probe_rows
from gve.data.schema import ShardError
from gve.data.shards import QUERY
from gve.data.sources import Source, manifest_digest, open_sources
from gve.inputs import InputBuilder, InputPolicy
from gve.items import InputError, TrainBatch

_DEFAULT_CURRICULUM = Curriculum()
_DEFAULT_INPUTS = InputPolicy()


class DevBatches:
    """The dev rows of all sources as steps: one source a step, equal shapes and counts on every rank.

    Args:
        sources: of the plan, with their dev rows.
        seed: of the run.
    """

    first_step = 0

    def __init__(self, sources: list[tuple[PlannedSource, np.ndarray]], seed: int) -> None:
        self._seed = seed
        self._steps = [
            (k, first, rows[first : first + source.batch], source.batch)
            for k, (source, rows) in enumerate(sources)
            for first in range(0, len(rows), source.batch)
        ]
        self.num_steps = len(self._steps)

    def rows(self, step: int, rank: int, world: int) -> Rows:
        source, first, rows, batch = self._steps[step]
        length = -(-min(batch, len(rows)) // world) * world
        filled = [*rows.tolist(), *[PADDING_ROW] * (length - len(rows))]
        places = tuple((0, position, row) for position, row in enumerate(filled, first))[rank::world]
        return Rows(0, step, source, places, key_of(self._seed, "dev", step, rank))


class PyramidDataModule(pl.LightningDataModule):
    """Streams one task a step over the levels of the pyramid, by a pure plan.

    The state is one small JSON record, equal on all ranks: a resume in mid-epoch is exact, with any number of workers
    and, for the same global batch, any number of ranks.

    Args:
        root: shard folder (with manifest.json), or its http(s) or s3 address.
        base: base model, for its tokenizer and geometry; linked from model.base.
        inputs: what the model reads; linked from model.inputs.
        steps_per_epoch: steps of one epoch.
        num_epochs: epochs of the run, which the curriculum is spread over; linked from trainer.max_epochs.
        batch_size: GLOBAL rows of one step over all ranks: one number, or by source name, task or "default"; a source
            with 0 is left out.
        negatives: hard negatives used per pair: one number, or by source name, task or "default".
        seed: of every draw.
        num_workers: loader processes per rank; 0 builds in the training process.
        curriculum: how the shares of the tasks are chosen.
        dev_pairs: rows per source (at most a tenth of it) that are held out of training and validated on.
        max_skip_rate: share of unreadable samples above which the run stops.
        negatives_file: hard negatives mined by `gve mine`, for pairs with fewer of their own than `negatives` asks for;
            none when empty.
        batch_divisor: every global batch is divided by it and rounded down, to at least a row per rank: a recipe's
            smoke run on less hardware. Fewer in-batch negatives are another loss, so no result may rest on it.

    Raises:
        InputError: a value is out of range.
    """

    def __init__(
        self,
        root: str,
        base: str = "",
        inputs: InputPolicy = _DEFAULT_INPUTS,
        steps_per_epoch: int = 4000,
        num_epochs: int = 3,
        batch_size: int | dict[str, int] = 1024,
        negatives: int | dict[str, int] = 0,
        seed: int = 42,
        num_workers: int = 2,
        curriculum: Curriculum = _DEFAULT_CURRICULUM,
        dev_pairs: int = 64,
        max_skip_rate: float = 0.01,
        negatives_file: str = "",
        batch_divisor: int = 1,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("steps_per_epoch", steps_per_epoch, 1),
            ("num_workers", num_workers, 0),
            ("dev_pairs", dev_pairs, 0),
            ("max_skip_rate", max_skip_rate, 0),
            ("batch_divisor", batch_divisor, 1),
        ):
            if value < least:
                raise InputError(f"data.{name} is {value}: use {least} or more")
        self.root, self.base, self.inputs = root, base, inputs
        self.steps_per_epoch, self.num_epochs, self.seed, self.num_workers = (
            steps_per_epoch,
            num_epochs,
            seed,
            num_workers,
        )
        self.batch_size, self.negatives = batch_size, negatives
        self.curriculum, self.dev_pairs, self.max_skip_rate = curriculum, dev_pairs, max_skip_rate
        self.negatives_file, self.batch_divisor = negatives_file, batch_divisor
        self._mined = MinedNegatives()
        self._state = PlanState(seed)
        self._sources: list[Source] = []
        self._planned: list[PlannedSource] = []
        self._dev: list[np.ndarray] = []
        self._plan: EpochPlan | None = None
        self._delivered = (0, 0)
        self._quarantine: Quarantine | None = None

    @property
    def sources(self) -> list[str]:
        """Names of the training sources, in the order of the plan."""
        return [source.name for source in self._planned]

    @property
    def tasks(self) -> list[str]:
        """Modality tasks that the shards hold, sorted."""
        return sorted({source.task for source in self._planned})

    @property
    def opened(self) -> dict[str, Source]:
        """The sources by name, as they are read."""
        return {source.name: source for source in self._sources}

    @property
    def held_out(self) -> dict[str, np.ndarray]:
        """Source -> sorted row numbers that are never trained on, nor used as hard negatives."""
        return {source.name: source.held_out for source in self._planned}

    @property
    def negatives_per_pair(self) -> dict[str, int]:
        """Source -> hard negatives that each of its pairs asks for."""
        return {
            each.name: setting_of(self.negatives, "negatives", each.name, each.record.task) for each in self._sources
        }

    @property
    def skipped(self) -> dict[str, int]:
        """Source -> samples that this process had to mask so far."""
        return dict(self._quarantine.skipped) if self._quarantine else {}

    def describe(self) -> list[str]:
        """Start-up self-check, one line: what a query is contrasted with."""
        hard = self.negatives_per_pair
        counts = Counter((planned.batch - 1, hard[planned.name]) for planned in self._planned)
        each = [f"{others} in the batch + {own} hard ({n} sources)" for (others, own), n in sorted(counts.items())]
        return [f"negatives of a query: {', '.join(each)}"]

    def setup(self, stage: str | None = None) -> None:
        """Opens and verifies the shards, splits off the dev rows and loads the tokenizer.

        Raises:
            InputError: the shards, the base or a setting cannot be used.
        """
        if self._sources:
            return
        if self.trainer is not None and self.trainer.accumulate_grad_batches != 1:
            raise InputError(
                "accumulate_grad_batches splits a batch into smaller contrastive batches, which is another loss; "
                "lower batch_size instead"
            )
        everything = open_sources(self.root)
        self._builder = InputBuilder.from_base(self.base, self.inputs)
        names = {"default", *everything, *TASKS}
        for setting, value in (("batch_size", self.batch_size), ("negatives", self.negatives)):
            if isinstance(value, dict) and (unknown := sorted(set(value) - names)):
                # A recipe names all sources of the paper; who has only some of them need not edit it.
                rank_zero_warn(f"data.{setting} names sources that {self.root} lacks: {', '.join(unknown)}")
        sources = {name: source for name, source in everything.items() if self._global_batch(source)}
        if not sources:
            raise InputError(f"data.batch_size is 0 for every source of {self.root}: give one a batch")
        for source in sources.values():
            self._check_presample(source)
            rows = np.asarray(source.index[:, QUERY:])
            dev, held_out = hold_out(rows, self.dev_pairs, self.seed, source.name)
            batch = self._global_batch(source)
            record = source.record
            self._planned.append(
                PlannedSource(source.name, record.task, record.level, batch, source.shard_sizes, held_out)
            )
            self._dev.append(dev)
        for planned in self._planned:
            if planned.batch % self._world[1]:
                raise InputError(
                    f"source {planned.name}: a global batch of {planned.batch} cannot be split over {self._world[1]} "
                    "ranks: use a multiple"
                )
        if self.negatives_file:
            self._use_negatives(Path(self.negatives_file), everything)
        self._sources = list(sources.values())
        self._manifest = manifest_digest(sources)
        folder = Path(self.trainer.default_root_dir) if self.trainer is not None else Path(".")
        self._quarantine = Quarantine(folder, self._world[0], self.max_skip_rate)

    def train_dataloader(self) -> StepLoader:
        return self._loader(self._begin_epoch, self.steps_per_epoch, list(self.negatives_per_pair.values()))

    def val_dataloader(self) -> StepLoader | list[StepLoader]:
        """The dev rows, or no loader when there are none."""
        dev = DevBatches(list(zip(self._planned, self._dev, strict=True)), self.seed)
        # A dev pair is compared with the other dev pairs of its source: its hard negatives need not be read.
        return self._loader(lambda: dev, dev.num_steps, [0] * len(self._sources)) if dev.num_steps else []

    def test_dataloader(self) -> StepLoader | list[StepLoader]:
        """The dev rows, as for validation."""
        return self.val_dataloader()

    def predict_dataloader(self) -> StepLoader | list[StepLoader]:
        """The dev rows, as for validation."""
        return self.val_dataloader()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Notes which training step has begun; `state_dict` asks whether it was completed."""
        if isinstance(batch, TrainBatch) and self.trainer is not None and self.trainer.training:
            self._delivered = (batch.step, self.trainer.global_step)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The plan's state in JSON-able primitives."""
        return self._current().to_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a state; whether it fits these shards is checked when training begins, not for validation."""
        self._state, self._plan = PlanState.from_dict(state_dict), None

    def set_scores(self, epoch: int, scores: Mapping[str, float]) -> None:
        """Gives the probe scores that the weights of an epoch are made of; equal on every rank.

        Args:
            epoch: an epoch that has not begun.
            scores: unit -> mean cosine of its positive pairs.

        Raises:
            InputError: the epoch has begun, or the units are not those of the shards.
        """
        units = set(units_of(self._planned, self.curriculum.unit))
        if set(scores) != units:
            raise InputError(f"scores for {sorted(scores)}, but the {self.curriculum.unit}s are {sorted(units)}")
        if self.has_begun(epoch):
            raise InputError(f"epoch {epoch} has begun: its weights are fixed")
        rounded = {unit: round(float(score), 6) for unit, score in scores.items()}
        self._state = replace(self._state, scores={**self._state.scores, str(epoch): rounded})

    def wants_scores(self, epoch: int) -> bool:
        """Whether a prober may still score an epoch: not begun, not scored, and its schedule would take them."""
        in_order = self.curriculum.in_order and epoch > 0
        return not (self.has_begun(epoch) or str(epoch) in self._state.scores or in_order)

    def probe_pairs(self, count: int) -> dict[str, ProbePairs]:
        """Unit -> its fixed pairs: chosen by the seed among training rows, spread over the unit's sources by size.

        Args:
            count: pairs of each unit (N_p of the paper); a smaller unit gives all it has.
        """
        chosen = {}
        for unit, members in sorted(units_of(self._planned, self.curriculum.unit).items()):
            rows = probe_rows([self._planned[k] for k in members], count, self.seed)
            chosen[unit] = ProbePairs([(self._sources[members[k]], row) for k, row in rows], self.inputs.sampling)
        return chosen

    def has_begun(self, epoch: int) -> bool:
        """Whether the plan of an epoch is made: its weights and hard negatives are fixed, also after a resume."""
        return str(epoch) in self._state.weights

    def set_negatives(self, epoch: int, path: Path) -> None:
        """Takes newly mined hard negatives into use from an epoch on; equal on every rank.

        Args:
            epoch: the next epoch, which has not begun.
            path: a file in `negatives/` of the run folder, where a resume looks for it by its digest.

        Raises:
            InputError: the epoch has begun, or the file belongs to other shards.
        """
        if self.has_begun(epoch):
            raise InputError(f"epoch {epoch} has begun: its hard negatives are fixed")
        self._use_negatives(path, self.opened)
        self._state = replace(self._state, negatives=self._mined.digest)

    def mixture(self, epoch: int | None = None) -> dict[str, float]:
        """Task -> probability that a step of the epoch (the current one by default) is of it."""
        epoch = self._state.epoch if epoch is None else epoch
        weights = self._weights(epoch)
        shares = dict.fromkeys(self.tasks, 0.0)
        for unit, members in units_of(self._planned, self.curriculum.unit).items():
            size = sum(self._planned[k].size for k in members)
            for k in members:
                shares[self._planned[k].task] += weights[unit] * self._planned[k].size / size
        return shares

    def curriculum_settings(self) -> dict[str, Any]:
        """What the weights of all epochs depend on beside the scores, in JSON-able primitives."""
        settings = asdict(self.curriculum)
        settings["configured_scores"] = settings.pop("scores")
        run = {"num_epochs": self.num_epochs, "steps_per_epoch": self.steps_per_epoch, "seed": self.seed}
        return {**settings, **run, "sizes": self._unit_sizes()}

    def curriculum_record(self, epoch: int) -> dict[str, Any]:
        """One epoch of the curriculum as it is, or would be by the newest scores; JSON-able, equal on every rank.

        Returns:
            epoch; sigma (None unless the schedule is "pyramid"); scores, probabilities and draws (steps of the whole
            epoch), each by unit; mixture: task -> probability, tasks from the bottom of the pyramid to its top.
        """
        weights = self._weights(epoch)
        drawn = np.bincount(self._plan_of(epoch, weights).source_of, minlength=len(self._planned))
        units = sorted(units_of(self._planned, self.curriculum.unit).items())
        mixture = self.mixture(epoch)
        pyramid = self.curriculum.schedule == "pyramid"
        scores = self._scores(epoch)
        return {
            "epoch": epoch,
            "sigma": self.curriculum.sigma_of(epoch, self.num_epochs) if pyramid else None,
            "scores": {unit: scores[unit] for unit, _ in units if unit in scores},
            "probabilities": weights,
            "draws": {unit: int(drawn[members].sum()) for unit, members in units},
            "mixture": {task: mixture[task] for task in TASKS if task in mixture},
        }

    @property
    def _world(self) -> tuple[int, int]:
        """(rank, ranks) among the processes that see different data; under tensor parallelism not all do."""
        kwargs = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return (int(kwargs["rank"]), int(kwargs["num_replicas"])) if kwargs else (0, 1)

    def _loader(self, begin: Any, num_steps: int, negatives: list[int]) -> StepLoader:
        assert self._quarantine is not None, "setup() comes first"
        build = StepBuilder(
            self._sources,
            self._builder,
            negatives,
            self.seed,
            self._quarantine,
            torch.full((max(self.num_workers, 1), 3), -1).share_memory_(),
            self._mined,
            self.held_out,
        )
        rank, world = self._world
        return StepLoader(
            begin, build, num_steps, num_workers=self.num_workers, rank=rank, world=world, agree=self._agree
        )

    def _agree(self, fault: str) -> str:
        """The first fault that any rank has; a collective."""
        if self.trainer is None or self.trainer.world_size == 1:
            return fault
        found = torch.tensor(int(bool(fault)), device=self.trainer.strategy.root_device)
        if not int(self.trainer.strategy.reduce(found, reduce_op="max")):
            return ""
        faults = [""] * self.trainer.world_size
        torch.distributed.all_gather_object(faults, fault)
        return next(fault for fault in faults if fault)

    def _begin_epoch(self) -> EpochPlan:
        """The plan of the epoch that Lightning is about to run, or of what is left of it."""
        state = self._current()
        if state.manifest:
            self._resume_negatives(state.negatives)
            state.check(self.seed, self._manifest, self._mined.digest)
        epoch = self.trainer.current_epoch if self.trainer is not None else state.epoch
        step = state.step if epoch == state.epoch else 0
        weights = self._weights(epoch)
        self._state = replace(
            state,
            epoch=epoch,
            step=step,
            weights={**state.weights, str(epoch): weights},
            manifest=self._manifest,
            negatives=self._mined.digest,
        )
        self._plan = self._plan_of(epoch, weights, first_step=step, cursors=state.cursors)
        self._delivered = (step - 1, -1)
        return self._plan

    def _plan_of(
        self, epoch: int, weights: Mapping[str, float], first_step: int = 0, cursors: Mapping[str, int] | None = None
    ) -> EpochPlan:
        return EpochPlan(
            self._planned,
            seed=self.seed,
            epoch=epoch,
            num_steps=self.steps_per_epoch,
            weights=weights,
            unit=self.curriculum.unit,
            first_step=first_step,
            cursors=cursors,
        )

    def _resume_negatives(self, digest: str) -> None:
        """A run that mined again goes on with what it mined last, not with the file of its configuration."""
        if digest != self._mined.digest and self.trainer is not None:
            for path in sorted(Path(self.trainer.default_root_dir).glob("negatives/*.safetensors")):
                if digest_of(path) == digest:
                    self._use_negatives(path, self.opened)

    def _use_negatives(self, path: Path, sources: Mapping[str, Source]) -> None:
        self._mined.use(path, sources)
        for source in self._mined.corpora:
            self._check_presample(source)

    def _current(self) -> PlanState:
        """The state by now: the step that was delivered last counts once the optimizer has stepped on it."""
        if self._plan is None:
            return self._state
        step, before = self._delivered
        completed = step + 1 if self.trainer is None or self.trainer.global_step > before else step
        return replace(self._state, step=completed, cursors=self._plan.cursors(completed))

    def _weights(self, epoch: int) -> dict[str, float]:
        """Unit -> probability in an epoch: as it was when the epoch began, else by the newest scores."""
        if str(epoch) in self._state.weights:
            return self._state.weights[str(epoch)]
        shares = self.curriculum.probabilities(epoch, self.num_epochs, self._scores(epoch), self._unit_sizes())
        # Rounded before use: another machine's exp() may differ in the last bit.
        return {unit: round(share, 9) for unit, share in shares.items()}

    def _unit_sizes(self) -> dict[str, int]:
        """Unit -> training rows."""
        units = sorted(units_of(self._planned, self.curriculum.unit).items())
        return {unit: sum(self._planned[k].size for k in members) for unit, members in units}

    def _scores(self, epoch: int) -> Mapping[str, float]:
        """Unit -> newest score that was measured before an epoch, else as configured; empty when there is none."""
        known = [int(e) for e in self._state.scores if int(e) <= epoch]
        return self._state.scores[str(max(known))] if known else self.curriculum.scores

    def _global_batch(self, source: Source) -> int:
        """Rows of one step of a source over all ranks; 0 leaves the source out."""
        batch = setting_of(self.batch_size, "batch_size", source.name, source.record.task)
        return divided_batch(batch, self.batch_divisor, self._world[1])

    def _check_presample(self, source: Source) -> None:
        presample = source.record.presample
        pixels = self.inputs.max_frame_tokens * self._builder.geometry.factor**2
        if presample is not None and not presample.serves(self.inputs.sampling, pixels):
            raise ShardError(
                f"source {source.name} stores {presample.sampling} frames of at most {presample.max_frame_px} px (0: "
                f"any), the run asks for {self.inputs.sampling} of {pixels} px: rebuild it with `gve shards build "
                f"--source {source.name} --presample '{self.inputs.sampling}' --presample-px {pixels} --replace ...`"
            )


def setting_of(value: int | dict[str, int], name: str, source: str, task: str) -> int:
    """A number that may be given by source, by task or for all.

    Args:
        value: as configured.
        name: of the setting, for messages.
        source, task: whose number it is.

    Raises:
        InputError: there is none.
    """
    if isinstance(value, int):
        return value
    for key in (source, task, "default"):
        if key in value:
            return value[key]
    raise InputError(f"data.{name} has no value for source {source} ({task}): add it or a default")


def divided_batch(batch: int, divisor: int, world: int) -> int:
    """A global batch after `batch_divisor`: at least a row per rank; 0 stays 0."""
    if divisor == 1 or batch < 1:
        return batch
    return max(batch // divisor // world, 1) * world
