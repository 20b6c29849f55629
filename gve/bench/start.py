"""`gve bench start`: seconds to start, memory over many steps, the cost of a resume, two ranks against one."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from gve.bench.clips import CAPTION, clips_of, shards_of
from gve.bench.fit import ShortFit, meters_of
from gve.bench.measure import Aim, Contest, Gauge, Options, Trial
from gve.data.datamodule import PyramidDataModule
from gve.data.manifest import Manifest, edit_manifest
from gve.data.plan import PlanState
from gve.data.shards import ShardWriter
from gve.encode.ranks import available_cores
from gve.inputs import InputPolicy
from gve.items import Item, Pair
from gve.toy.base import EMBEDDED
from gve.video import Sampling

SHARDS = 10_000
SOURCES = 40
STEPS = 100_000  # of the epoch that is resumed
MEMORY_STEPS = 2_000


def trials(options: Options) -> Iterator[Trial]:
    """Help, start over 10,000 shards, resume early and late, memory of 2,000 steps, ranks."""
    yield Gauge("gve --help", help_seconds, "s", at_most=1.0)
    root = many_shards(options.folder / "many")
    setting = {"shards": SHARDS, "sources": SOURCES, "without": "imports"}
    yield Gauge(
        f"start over {SHARDS:,} indexed shards to the first batch",
        partial(start_seconds, root),
        "s",
        at_most=5.0,
        setting=setting,
    )
    yield Contest(
        f"resume at step 10 and at step {STEPS - 10:,} of an epoch, to the first batch",
        {"late": partial(resumed, root, STEPS - 10), "early": partial(resumed, root, 10)},
        [Aim("late", "early", "cost", 1.1)],
        setting=setting,
        clock="cpu",
    )
    yield Gauge(
        f"growth of memory from step {MEMORY_STEPS // 4:,} to {MEMORY_STEPS:,} of a fit of texts",
        partial(growth_mb, root, options.folder),
        "MiB",
        at_most=16.0,
        setting={"steps": MEMORY_STEPS, "batch": 4, "workers": 0, "model": "gve/toy/weights"},
        rounds=1,
    )
    clips, words = clips_of(options)
    shards_of(clips, options.folder, Sampling.uniform(8), 200 * 28**2)
    cores = available_cores()
    yield Gauge(
        "2 ranks against 1: pairs/s at one global batch, one thread each",
        partial(rank_gain, options.folder / "frames", options.folder),
        "times",
        at_least=1.8 if cores > 1 else None,
        setting={"clips": words, "batch": 4, "workers": 1, "cores": cores, "note": "needs idle cores: see load"},
        rounds=min(options.rounds, 3),
    )


def help_seconds() -> float:
    """Wall time of `python -m gve --help`."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-m", "gve", "--help"], check=True, capture_output=True, timeout=60)
    return time.perf_counter() - begun


def many_shards(root: Path, shards: int = SHARDS, sources: int = SOURCES) -> Path:
    """A shard folder of text pairs, one a shard: the tars of one source, which the others are links to."""
    each = shards // sources
    with ShardWriter(root, task="T2T", source="first", samples_per_shard=1) as writer:
        for number in range(each):
            writer.write(Pair(Item.of(f"{CAPTION} {number}"), Item.of(f"{number} {CAPTION}")))
    first = Manifest.load(root).sources["first"]
    with edit_manifest(root) as known:
        for number in range(1, sources):
            known[f"s{number}"] = replace(first, name=f"s{number}")
    return root


def module_of(root: Path) -> PyramidDataModule:
    """The data of a run of texts, opened."""
    policy = InputPolicy(sampling=Sampling.uniform(8))
    data = PyramidDataModule(
        str(root), str(EMBEDDED), policy, steps_per_epoch=STEPS, num_epochs=1, batch_size=4, num_workers=0, dev_pairs=0
    )
    data.setup("fit")
    return data


def start_seconds(root: Path) -> float:
    """Wall time from nothing to the first batch."""
    begun = time.perf_counter()
    next(iter(module_of(root).train_dataloader()))
    return time.perf_counter() - begun


def resumed(root: Path, step: int) -> int:
    """A run goes on at a step; gives the rows of the first batch."""
    data = module_of(root)
    next(iter(data.train_dataloader()))
    state = PlanState.from_dict(data.state_dict())
    data.load_state_dict(replace(state, step=step).to_dict())
    batch = next(iter(data.train_dataloader()))
    assert batch.step == step
    return len(batch)


def growth_mb(root: Path, folder: Path, steps: int = MEMORY_STEPS) -> float:
    """How much the resident memory of a fit grows after its first quarter, in MiB."""
    return meters_of(ShortFit(str(root), tempfile.mkdtemp(dir=folder), steps=steps, workers=0))["growth_mb"]


def rank_gain(root: Path, folder: Path) -> float:
    """Pairs a second of two ranks over those of one."""
    rates = [
        meters_of(ShortFit(str(root), tempfile.mkdtemp(dir=folder), ranks=ranks, workers=1))["pairs_per_s"]
        for ranks in (1, 2)
    ]
    return rates[1] / rates[0]
