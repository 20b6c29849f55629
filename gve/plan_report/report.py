"""The report of a plan: its sources with their lengths, the machines, and what the run does and costs on them.

The draw is a pure function of scores and sizes, so the expected passes follow from it:

    steps of source k in epoch e = steps_per_epoch x P_e(unit of k) x size_k / size of its unit
    passes = steps x batch_k / size_k

Costs are counts (gve.plan_report.costs) over lengths (gve.plan_report.lengths); GPU-hours = operations / (peak x mfu).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import Namespace

from gve.data.datamodule import divided_batch, setting_of
from gve.data.manifest import MANIFEST
from gve.data.mixture import mixture
from gve.data.plan import PlannedSource, permutation
from gve.data.sources import Source, open_sources
from gve.items import InputError
from gve.plan_report.costs import (
    Architecture,
    Pictures,
    Sequences,
    Training,
    checkpoint_bytes,
    lora_of,
    step_flops,
    step_memory,
)
from gve.plan_report.draws import Epoch, expected_steps
from gve.plan_report.lengths import Assumptions, Lengths, Side


@dataclass(frozen=True)
class Speed:
    """What turns counted operations into hours.

    Args:
        mfu: share of the peak that the counted operations reach, recomputation counted. An assumption, not measured.
        peak_tflops: dense bfloat16 peak of one GPU, in 1e12 operations a second (A100: 312; H100, H200: 989).
    """

    mfu: float = 0.35
    peak_tflops: float = 312.0

    def __post_init__(self) -> None:
        if not (0 < self.mfu <= 1 and self.peak_tflops > 0):
            raise InputError(f"mfu {self.mfu} of {self.peak_tflops} TFLOP/s: use a share in (0, 1] of a peak above 0")

    def hours(self, operations: float) -> float:
        """GPU-hours of so many operations."""
        return operations / (self.peak_tflops * 1e12 * self.mfu) / 3600


@dataclass(frozen=True)
class Row:
    """One source of the plan.

    Args:
        source: name, task, level, global batch and training rows.
        wanted: hard negatives per pair by configuration.
        negatives: hard negatives per pair that there are.
        query, target: lengths.
        bytes: of its shards; 0 where there are none yet.
    """

    source: PlannedSource
    wanted: int
    negatives: float
    query: Side
    target: Side
    bytes: int = 0

    def batches(self, world: int) -> list[Sequences]:
        """Forward passes of one rank in one step: queries, targets, hard negatives."""
        rows = self.source.batch // world
        sides = [(rows, self.query), (rows, self.target), (rows * self.negatives, self.target)]
        return [Sequences(count, side.padded) for count, side in sides if count]

    def pictures(self, world: int) -> list[Pictures]:
        """Pictures of one rank in one step."""
        rows = self.source.batch / world
        return self.query.pictures(rows) + self.target.pictures(rows * (1 + self.negatives))

    @property
    def tokens(self) -> float:
        """Tokens of one step over all ranks, without padding."""
        return self.source.batch * (self.query.tokens + self.target.tokens * (1 + self.negatives))


@dataclass(frozen=True)
class Machines:
    """Where the run runs: nodes, GPUs of a node, and the strategy that divides memory ("ddp", "fsdp", "zero2")."""

    nodes: int
    devices: int
    strategy: str = "ddp"

    @property
    def world(self) -> int:
        return self.nodes * self.devices

    @classmethod
    def of(cls, trainer: Namespace) -> Machines:
        """Those of a parsed configuration; devices that only the machine itself knows count as one."""
        devices = trainer.devices
        if isinstance(devices, (list, tuple)):
            count = len(devices)
        else:
            text = str(devices)
            count = len(text.split(",")) if "," in text else max(1, int(text)) if text.lstrip("-").isdigit() else 1
        strategy = trainer.strategy
        name = str(strategy["class_path"] if isinstance(strategy, Namespace) else strategy).lower()
        kind = "fsdp" if "fsdp" in name or "modelparallel" in name else "zero2" if "deepspeed" in name else "ddp"
        return cls(int(trainer.num_nodes), count, kind)


@dataclass(frozen=True)
class Planned:
    """Everything that is printed, see `to_dict`."""

    sizes: Architecture
    machines: Machines
    how: Training
    unit: str
    steps: int
    epochs: list[Epoch]
    rows: list[Row]
    assumed: Assumptions
    speed: Speed

    def steps_of(self) -> dict[str, list[float]]:
        """Source -> expected steps in each epoch."""
        planned = [row.source for row in self.rows]
        each = [expected_steps(epoch, planned, self.unit, self.steps) for epoch in self.epochs]
        return {source.name: [steps[source.name] for steps in each] for source in planned}

    def to_dict(self) -> dict[str, Any]:
        """The report in JSON-able form; bytes, operations and hours are estimates, all others follow from the plan."""
        world, steps_of = self.machines.world, self.steps_of()
        sources, flops, memory = [], Counter[str](), []
        for row in self.rows:
            steps = steps_of[row.source.name]
            batches, pictures = row.batches(world), row.pictures(world)
            step = step_flops(self.sizes, batches, pictures, self.how)
            flops.update({part: value * world * sum(steps) for part, value in step.items()})
            memory.append((self._memory(row, self.how), row.source.name))
            passes = [count * row.source.batch / row.source.size for count in steps]
            sources.append(
                {
                    "name": row.source.name,
                    "task": row.source.task,
                    "level": row.source.level,
                    "rows": row.source.size,
                    "batch": row.source.batch,
                    "steps": [round(count, 2) for count in steps],
                    "passes": [round(count, 4) for count in passes],
                    "passes_total": round(sum(passes), 4),
                    "hard_negatives": row.negatives,
                    "hard_negatives_configured": row.wanted,
                    "negatives_per_query": round(row.source.batch - 1 + row.negatives, 2),
                    "tokens_query": round(row.query.tokens, 1),
                    "tokens_target": round(row.target.tokens, 1),
                    "tokens_per_step": round(row.tokens),
                    "vision_tokens_per_step": round(
                        world * sum(each.patches for each in pictures) / self.sizes.merge**2
                    ),
                    "peak_bytes": round(memory[-1][0]["peak"]),
                }
            )
        worst, name = max(memory, key=lambda each: each[0]["peak"])
        other = replace(self.how, checkpointing=not self.how.checkpointing)
        row = next(row for row in self.rows if row.source.name == name)
        peaks = {self.how.checkpointing: worst["peak"], other.checkpointing: self._memory(row, other)["peak"]}
        hours = self.speed.hours(flops.total())
        return {
            "parameters": {**self.sizes.parameters(), "trained": self._trained()},
            "machines": {**asdict(self.machines), "world": world},
            "steps": self.steps * len(self.epochs),
            "pairs": round(sum(sum(steps_of[row.source.name]) * row.source.batch for row in self.rows)),
            "tokens": round(sum(sum(steps_of[row.source.name]) * row.tokens for row in self.rows)),
            "epochs": [asdict(epoch) for epoch in self.epochs],
            "unit": self.unit,
            "sources": sources,
            "memory": {
                "source": name,
                **{part: round(value) for part, value in worst.items()},
                "peak_with_checkpointing": round(peaks[True]),
                "peak_without_checkpointing": round(peaks[False]),
            },
            "flops": {**flops, "total": flops.total()},
            "gpu_hours": hours,
            "wall_hours": hours / world,
            "disk": {
                "shards": sum(row.bytes for row in self.rows),
                "checkpoint": checkpoint_bytes(self.sizes, self.how),
            },
            "assumptions": {**asdict(self.assumed), **asdict(self.speed)},
        }

    def _trained(self) -> int:
        return self.sizes.lora_parameters(self.how.rank, self.how.targets) if self.how.rank else 0

    def _memory(self, row: Row, how: Training) -> dict[str, float]:
        world = self.machines.world
        return step_memory(
            self.sizes, row.batches(world), row.pictures(world), how, pairs=row.source.batch // world, world=world
        )


def rows_of(data: Namespace, lengths: Lengths, world: int, size: str, sample: int) -> tuple[list[Row], list[str]]:
    """The sources of a run and what is to be said about them: those of its shards, else those of the paper.

    Args:
        data: the `data` part of a parsed configuration.
        lengths: of the run's base and policy.
        world: GPUs of the run.
        size: "3b" or "7b": which of the paper's mixtures stands in where there are no shards.
        sample: rows of each source whose lengths are read; 0 assumes all lengths.

    Raises:
        InputError: shards or settings cannot be used, as the run itself would say.
    """
    if "://" not in data.root and not (Path(data.root) / MANIFEST).is_file():
        return _published(data, lengths, world, size), [
            f"data.root {data.root} holds no shards here: sizes are the paper's for {size}, lengths assumed"
        ]
    rows, said = [], []
    if not lengths.exact:
        said.append("the base's tokenizer is not on this machine: tokens are counted from words")
    for source in open_sources(data.root).values():
        row = _stored(data, source, lengths, world, sample)
        if row is None:
            continue
        rows.append(row)
    if short := [
        f"{row.source.name} {row.negatives:.3g} of {row.wanted}" for row in rows if row.negatives < row.wanted
    ]:
        said.append(f"rows hold fewer hard negatives than configured (`gve mine` finds some): {', '.join(short)}")
    return rows, said


def _published(data: Namespace, lengths: Lengths, world: int, size: str) -> list[Row]:
    rows = []
    for entry in mixture().values():
        batch = _global_batch(data, entry.name, entry.task, world)
        if not batch:
            continue
        pairs, wanted = entry.size(size), setting_of(data.negatives, "negatives", entry.name, entry.task)
        query, target = lengths.assume(entry.task, entry.instruction)
        bytes_of = [side.stored_bytes(lengths.geometry) for side in (query, target)]
        planned = _planned(entry.name, entry.task, entry.level, batch, np.array([pairs]), data.dev_pairs)
        rows.append(Row(planned, wanted, wanted, query, target, round(pairs * sum(bytes_of))))
    return rows


def _stored(data: Namespace, source: Source, lengths: Lengths, world: int, sample: int) -> Row | None:
    record = source.record
    batch = _global_batch(data, source.name, record.task, world)
    if not batch:
        return None
    wanted = setting_of(data.negatives, "negatives", source.name, record.task)
    planned = _planned(source.name, record.task, record.level, batch, source.shard_sizes, data.dev_pairs)
    query, target = lengths.assume(record.task, record.instruction)
    negatives = float(wanted)
    if sample:
        chosen = permutation(len(source), data.seed, "plan", source.name)[:sample].tolist()
        query, target, inline = lengths.measure(source, chosen, wanted)
        if not data.negatives_file:
            negatives = inline
    return Row(planned, wanted, negatives, query, target, record.bytes)


def _planned(name: str, task: str, level: int, batch: int, shard_sizes: np.ndarray, dev_pairs: int) -> PlannedSource:
    """As the DataModule has it, but for copies of dev pairs, which only the index knows."""
    rows = int(shard_sizes.sum())
    return PlannedSource(name, task, level, batch, shard_sizes, np.arange(min(dev_pairs, rows // 10)))


def _global_batch(data: Namespace, source: str, task: str, world: int) -> int:
    """Rows of one step of a source; 0 leaves it out.

    Raises:
        InputError: it cannot be split over the GPUs.
    """
    batch = divided_batch(setting_of(data.batch_size, "batch_size", source, task), data.batch_divisor, world)
    if batch % world:
        raise InputError(
            f"source {source}: a global batch of {batch} cannot be split over {world} GPUs: use a multiple, or other "
            "--nodes and --devices"
        )
    return batch


def training_of(config: Namespace, machines: Machines) -> Training:
    """How a parsed configuration runs its steps."""
    model = config.model
    return Training(
        **lora_of(model.lora),
        dtype_bytes=2 if model.dtype == "bfloat16" else 4,
        checkpointing=model.gradient_checkpointing,
        chunk_tokens=model.chunk_tokens,
        loss_tile=model.loss_tile,
        shards=machines.world if machines.strategy == "fsdp" else 1,
        optimizer_shards=machines.world if machines.strategy == "zero2" else 1,
    )


def warnings_of(report: Mapping[str, Any], max_passes: float, gpu_bytes: float) -> list[str]:
    """What should be mended before the run: sources seen too often, a GPU that is too small."""
    said = []
    often = sorted((source["passes_total"], source["name"]) for source in report["sources"])
    often = [each for each in reversed(often) if each[0] > max_passes]
    if often:
        named = ", ".join(f"{name} {passes:.1f}" for passes, name in often)
        said.append(
            f"{len(often)} sources are passed over more than {max_passes:g} times: {named}; a larger "
            "curriculum.size_exponent, fewer steps or a smaller batch repeats them less"
        )
    memory = report["memory"]
    if memory["peak"] > gpu_bytes:
        said.append(
            f"a step of {memory['source']} needs about {memory['peak'] / 1e9:.0f} GB on each GPU, of "
            f"{gpu_bytes / 1e9:.0f}: set model.chunk_tokens, or a smaller batch_size"
        )
    return said
