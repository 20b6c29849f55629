"""The DataModule in a real Trainer: the same batches for any workers, exact resume, bad samples accounted for."""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gve.data import loader as loader_module
from gve.data.curriculum import Curriculum
from gve.data.datamodule import PyramidDataModule
from gve.data.loader import Quarantine, StepBuilder, StepLoader
from gve.data.manifest import Presample
from gve.data.plan import Rows
from gve.data.probe import allot
from gve.data.schema import ShardError
from gve.data.shards import OFFSET, ShardWriter
from gve.data.sources import open_sources
from gve.inputs import InputPolicy
from gve.items import EmbedBatch, Frames, InputError, Item, Pair, TrainBatch, Video
from gve.video import Sampling

SPECIAL = ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
POLICY = InputPolicy(sampling=Sampling.uniform(2), system_prompt="S")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Tokenizer (one token a byte) and config of a base model, without weights."""
    folder = tmp_path_factory.mktemp("base")
    vocab = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(f"<|{name}|>", special=True) for name in SPECIAL])
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|endoftext|>").save_pretrained(folder)
    config = {
        "model_type": "qwen2_5_vl",
        "vision_config": {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "tokens_per_second": 2},
        "vision_start_token_id": 259,
        "vision_end_token_id": 260,
        "image_token_id": 261,
        "video_token_id": 262,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sources of three tasks: 60 texts with 0 to 3 negatives, 48 images, 40 pre-sampled clips."""
    root = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    with ShardWriter(root, task="T2T", source="talk", samples_per_shard=9, instruction="find") as writer:
        for i in range(60):
            negatives = tuple(Item.of(f"not {i} {j}") for j in range(i % 4))
            writer.write(Pair(Item.of(f"question {i}"), Item.of(f"answer {i}"), negatives))
    with ShardWriter(root, task="T2I", source="stills", samples_per_shard=16) as writer:
        for i in range(48):
            writer.write(Pair(Item.of(f"still {i}"), Item.of(image=rng.integers(0, 256, (56, 56, 3), dtype=np.uint8))))
    policy = Presample(Sampling.uniform(4))
    with ShardWriter(root, task="T2V", source="clips", samples_per_shard=40, presample=policy) as writer:
        for i in range(40):
            indices = np.array([0, 3, 6, 9])
            clip = Frames(rng.integers(0, 256, (4, 56, 56, 3), dtype=np.uint8), indices / 5.0, indices, 10, 5.0)
            writer.write(Pair(Item.of(f"clip {i}"), Item((Video(clip),))))
    return root


def data(root: Path, base: str, **changes: Any) -> PyramidDataModule:
    settings: dict[str, Any] = {
        "inputs": POLICY,
        "steps_per_epoch": 12,
        "num_epochs": 2,
        "batch_size": {"default": 4, "stills": 6},
        "negatives": {"T2T": 2, "default": 0},
        "num_workers": 0,
        "dev_pairs": 4,
    }
    return PyramidDataModule(str(root), base, **{**settings, **changes})


class Model(pl.LightningModule):
    """One weight, so that Lightning steps; keeps what it is fed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches: list[TrainBatch] = []
        self.dev: list[TrainBatch] = []

    def training_step(self, batch: TrainBatch, index: int) -> torch.Tensor:
        self.batches.append(batch)
        return (self.weight - 1) ** 2

    def validation_step(self, batch: TrainBatch, index: int) -> None:
        self.dev.append(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(folder: Path, *callbacks: Callback, **changes: Any) -> pl.Trainer:
    settings: dict[str, Any] = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "default_root_dir": folder,
        "callbacks": list(callbacks),
    }
    return pl.Trainer(**{**settings, **changes})


def fit(module: PyramidDataModule, folder: Path, *callbacks: Callback, path: Any = None, **changes: Any) -> Model:
    model = Model()
    trainer(folder, *callbacks, **changes).fit(model, datamodule=module, ckpt_path=path, weights_only=True)
    return model


def same(one: Any, other: Any) -> bool:
    """Bit-equality of batches."""
    if isinstance(one, (TrainBatch, EmbedBatch)):
        return all(same(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def steps(batches: list[TrainBatch]) -> list[tuple[int, int]]:
    return [(batch.epoch, batch.step) for batch in batches]


ALL = [(epoch, step) for epoch in range(2) for step in range(12)]

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers.*")


@pytest.fixture(scope="module")
def uninterrupted(shards: Path, base: str, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return fit(data(shards, base), tmp_path_factory.mktemp("run"))


# -------------------------------------------------------------------------------------------------------- what is fed


def test_two_epochs_of_one_task_a_step(uninterrupted: Model, shards: Path) -> None:
    batches = uninterrupted.batches
    assert steps(batches) == ALL
    assert {(b.source, b.task, len(b)) for b in batches} == {
        ("talk", "T2T", 4),
        ("stills", "T2I", 6),
        ("clips", "T2V", 4),
    }
    for batch in batches:
        assert batch.query.image_grid is None
        assert batch.query.video_grid is None
        assert (batch.target.image_grid is not None) == (batch.task == "T2I")
        # uniform(2) out of 4 stored frames of 56 x 56 px: one grid step of 4 x 4 patches.
        if batch.task == "T2V":
            assert batch.target.video_grid.tolist() == [[1, 4, 4]] * 4
        assert len(set(batch.query.content_ids.tolist())) == len(batch)
        assert bool((batch.query.valid & batch.target.valid).all())
    assert len({batch.seed for batch in batches}) == 24


def test_negatives_are_ragged_and_keyed(uninterrupted: Model, shards: Path, base: str) -> None:
    talk = [batch for batch in uninterrupted.batches if batch.task == "T2T"]
    counts = set()
    for batch in talk:
        assert batch.negative_index.shape == (4, 2)
        used = batch.negative_index[batch.negative_index >= 0]
        assert used.tolist() == list(range(len(batch.negatives)) if batch.negatives else [])
        counts |= set((batch.negative_index >= 0).sum(1).tolist())
    assert counts == {0, 1, 2}, "pairs have 0 to 3 negatives, 2 are used"
    others = [batch for batch in uninterrupted.batches if batch.task != "T2T"]
    assert all(b.negatives is None and b.negative_index.shape == (len(b), 0) for b in others)


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_change_nothing(workers: int, uninterrupted: Model, shards: Path, base: str, tmp_path: Path) -> None:
    assert same(fit(data(shards, base, num_workers=workers), tmp_path).batches, uninterrupted.batches)


def test_another_seed_changes_rows(uninterrupted: Model, shards: Path, base: str, tmp_path: Path) -> None:
    other = fit(data(shards, base, seed=43), tmp_path, max_epochs=1)
    assert not same(other.batches, uninterrupted.batches[:12])


def test_dev_rows_are_never_trained_on(uninterrupted: Model, shards: Path) -> None:
    dev = uninterrupted.dev[:3]
    assert [(batch.source, len(batch)) for batch in dev] == [("clips", 4), ("stills", 4), ("talk", 4)]
    assert same(uninterrupted.dev[3:], dev), "the same rows after every epoch"
    held_out = {i for batch in dev for i in batch.query.content_ids.tolist()}
    trained = {i for batch in uninterrupted.batches for i in batch.query.content_ids.tolist()}
    assert len(held_out) == 12
    assert not held_out & trained


# ------------------------------------------------------------------------------------------------------------- resume


class Stop(Callback):
    """Ends the run like a kill: an exception after a training step was saved."""

    def __init__(self, global_step: int) -> None:
        self.global_step = global_step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.global_step:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "stop.ckpt")
            raise InterruptedError


@pytest.mark.parametrize(("at", "workers"), [(5, 0), (12, 0), (17, 2), (23, 0)])
def test_resume_is_exact(
    at: int, workers: int, uninterrupted: Model, shards: Path, base: str, tmp_path: Path, recwarn: Any
) -> None:
    with pytest.raises(InterruptedError):
        fit(data(shards, base, num_workers=2), tmp_path, Stop(at))
    checkpoint = torch.load(tmp_path / "stop.ckpt", weights_only=True)
    state = checkpoint["PyramidDataModule"]
    assert json.loads(json.dumps(state)) == state
    resumed = fit(data(shards, base, num_workers=workers), tmp_path, path=tmp_path / "stop.ckpt")
    assert same(resumed.batches, uninterrupted.batches[at:])
    assert not [w for w in recwarn if "not resumable" in str(w.message)]


def test_resume_from_the_checkpoint_of_an_epochs_end(
    uninterrupted: Model, shards: Path, base: str, tmp_path: Path
) -> None:
    keep = ModelCheckpoint(tmp_path, "end", save_last=True)
    fit(data(shards, base), tmp_path, keep, max_epochs=1)
    assert steps(fit(data(shards, base), tmp_path, path=tmp_path / "last.ckpt").batches) == ALL[12:]
    assert same(fit(data(shards, base), tmp_path, path=tmp_path / "last.ckpt").batches, uninterrupted.batches[12:])


def test_resume_with_other_batches_repeats_no_row(
    uninterrupted: Model, shards: Path, base: str, tmp_path: Path
) -> None:
    with pytest.raises(InterruptedError):
        fit(data(shards, base), tmp_path, Stop(7))
    resumed = fit(data(shards, base, batch_size=2), tmp_path, path=tmp_path / "stop.ckpt")
    for source, size in (("talk", 56), ("stills", 44), ("clips", 36)):
        fed = [b for b in uninterrupted.batches[:7] + resumed.batches if b.source == source]
        places = [number * size + position for batch in fed for number, position in batch.rows]
        assert places == list(range(len(places)))


def test_other_shards_or_seeds_refuse_the_checkpoint(shards: Path, base: str, tmp_path: Path) -> None:
    with pytest.raises(InterruptedError):
        fit(data(shards, base), tmp_path, Stop(3))
    with pytest.raises(InputError, match="other seed"):
        fit(data(shards, base, seed=43), tmp_path, path=tmp_path / "stop.ckpt")
    with ShardWriter(tmp_path / "other", task="T2T", source="talk") as writer:
        for i in range(20):
            writer.write(Pair(Item.of(f"q {i}"), Item.of(f"a {i}")))
    with pytest.raises(InputError, match="other shards"):
        fit(data(tmp_path / "other", base), tmp_path, path=tmp_path / "stop.ckpt")


# --------------------------------------------------------------------------------------------------------- curriculum


class Prober(Callback):
    def on_train_epoch_end(self, trainer: pl.Trainer, model: pl.LightningModule) -> None:
        data = trainer.datamodule
        if trainer.current_epoch + 1 < trainer.max_epochs:
            data.set_scores(trainer.current_epoch + 1, {"T2T": 9.0, "T2I": 0.0, "T2V": 0.0})


def test_scores_of_an_epochs_end_weigh_the_next(shards: Path, base: str, tmp_path: Path) -> None:
    module = data(shards, base)
    model = fit(module, tmp_path, Prober())
    assert {batch.task for batch in model.batches[:12]} == {"T2T", "T2I", "T2V"}
    # sigma is 1.0 in the last of two epochs: P(T2T) = e^9 / (e^9 + 2) = 0.99975.
    assert {batch.task for batch in model.batches[12:]} == {"T2T"}
    assert module.mixture()["T2T"] == pytest.approx(0.999753, abs=1e-6)
    assert module.mixture(0) == pytest.approx({"T2I": 1 / 3, "T2T": 1 / 3, "T2V": 1 / 3}, abs=1e-8)
    assert module.state_dict()["scores"] == {"1": [0.0, 9.0, 0.0]}
    with pytest.raises(InputError, match="epoch 1 has begun"):
        module.set_scores(1, {"T2T": 0.0, "T2I": 0.0, "T2V": 0.0})
    with pytest.raises(InputError, match="scores for"):
        module.set_scores(2, {"T2T": 0.0})


def test_start_up_line_says_what_a_query_is_contrasted_with(shards: Path, base: str) -> None:
    module = data(shards, base)
    module.setup()
    assert module.describe() == [
        "negatives of a query: 3 in the batch + 0 hard (1 sources), 3 in the batch + 2 hard (1 sources), "
        "5 in the batch + 0 hard (1 sources)"
    ]


def test_mixture_of_sources(shards: Path, base: str) -> None:
    module = data(shards, base, curriculum=Curriculum("uniform", unit="source", size_exponent=1.0))
    module.setup()
    # 60, 48 and 40 rows, 4 of each held out.
    assert module.mixture() == pytest.approx({"T2T": 56 / 136, "T2I": 44 / 136, "T2V": 36 / 136}, abs=1e-8)
    assert module.tasks == ["T2I", "T2T", "T2V"]
    assert module.sources == ["clips", "stills", "talk"]


def test_scores_of_an_order_are_those_before_the_first_epoch(shards: Path, base: str) -> None:
    module = data(shards, base, curriculum=Curriculum("easy_first"), num_epochs=3)
    module.setup()
    with pytest.raises(InputError, match="no score for T2I"):
        module.curriculum_record(0)
    assert module.wants_scores(0)
    module.set_scores(0, {"T2T": 0.2, "T2I": 0.5, "T2V": 0.4})
    assert not module.wants_scores(0), "scored already"
    assert not module.wants_scores(1), "the order stands"
    drawn = [module.curriculum_record(epoch)["draws"] for epoch in range(3)]
    assert drawn == [{"T2I": 12, "T2T": 0, "T2V": 0}, {"T2I": 0, "T2T": 0, "T2V": 12}, {"T2I": 0, "T2T": 12, "T2V": 0}]


def test_probe_pairs_are_fixed_training_rows_of_all_sources(shards: Path, base: str) -> None:
    module = data(shards, base, curriculum=Curriculum(unit="level"), dev_pairs=4)
    module.setup()
    pairs = module.probe_pairs(20)
    assert {unit: len(found) for unit, found in pairs.items()} == {"1": 20, "2": 20}
    # Level 1 is talk (56 training rows) and stills (44): 11.2 and 8.8 of 20.
    assert Counter(key.split("_")[0] for key in pairs["1"].keys) == {"talk": 11, "stills": 9}
    again = module.probe_pairs(20)
    assert [again[unit].keys for unit in again] == [pairs[unit].keys for unit in pairs]
    by_task = data(shards, base)
    by_task.setup()
    # A source's pairs are the first of one order: more keep the fewer, under another unit too.
    assert by_task.probe_pairs(30)["T2T"].keys[:11] == [key for key in pairs["1"].keys if key.startswith("talk")]
    other = data(shards, base, seed=43)
    other.setup()
    assert other.probe_pairs(30)["T2T"].keys != by_task.probe_pairs(30)["T2T"].keys
    everything = by_task.probe_pairs(1000)
    assert {unit: len(found) for unit, found in everything.items()} == {"T2I": 44, "T2T": 56, "T2V": 36}
    for source, rows in by_task.held_out.items():
        dev = {by_task.opened[source].key(row) for row in rows.tolist()}
        assert not dev & {key for found in everything.values() for key in found.keys}
    # As training reads them: 2 of the 4 stored frames, no negatives; a worker's copy reads the same.
    found = pickle.loads(pickle.dumps(everything["T2V"]))
    assert found[0].target.parts[0].source.indices.tolist() == [0, 9]
    assert found[0].key == everything["T2V"].keys[0]
    assert {len(pair.negatives) for pair in (everything["T2T"][number] for number in range(56))} == {0}


def test_a_count_is_split_by_size() -> None:
    assert allot(10, [90, 10]) == [9, 1]
    # 191.9, 60.4 and 3.7 of 256: the two largest remainders get one more.
    assert allot(256, [5_400_000, 1_700_000, 104_000]) == [192, 60, 4]
    assert allot(4, [97, 2, 1]) == [2, 1, 1], "none is left out while there is one for each"
    assert allot(3, [5, 1, 1, 1]) == [1, 1, 1, 0]
    assert allot(100, [5, 0, 3]) == [5, 0, 3]
    assert sum(allot(7, [3, 3, 3])) == 7


# -------------------------------------------------------------------------------------------------------- bad samples


def test_a_batch_of_0_leaves_a_source_out(shards: Path, base: str) -> None:
    module = data(shards, base, batch_size={"default": 4, "clips": 0})
    module.setup()
    assert module.sources == ["stills", "talk"]
    assert module.tasks == ["T2I", "T2T"]
    assert {batch.source for batch in module.train_dataloader()} == {"stills", "talk"}
    with pytest.raises(InputError, match="batch_size is 0 for every source"):
        data(shards, base, batch_size=0).setup()


def test_a_divisor_scales_every_batch(shards: Path, base: str) -> None:
    module = data(shards, base, batch_size={"talk": 16, "stills": 6, "clips": 1}, batch_divisor=3, steps_per_epoch=30)
    module.setup()
    sizes = {batch.source: len(batch) for batch in module.train_dataloader()}
    assert sizes == {"talk": 16 // 3, "stills": 6 // 3, "clips": 1}


def damage(root: Path, source: str, rows: list[int]) -> list[str]:
    """Changes a byte of each row's sample, sizes kept; returns the keys."""
    opened = open_sources(root)[source]
    for row in rows:
        shard = int(np.searchsorted(np.cumsum(opened.shard_sizes), row, side="right"))
        with open(root / opened.record.shards[shard].file, "r+b") as file:
            file.seek(int(opened.index[row, OFFSET]) + 512 + 5)
            file.write(b"\xff")
    return [opened.key(row) for row in rows]


@pytest.fixture
def damaged(shards: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    root = tmp_path / "damaged"
    for path in shards.rglob("*"):
        if path.is_file():
            (root / path.relative_to(shards)).parent.mkdir(parents=True, exist_ok=True)
            (root / path.relative_to(shards)).write_bytes(path.read_bytes())
    return root, damage(root, "talk", list(range(0, 60, 5)))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_masked_and_written_down(
    workers: int, damaged: tuple[Path, list[str]], base: str, tmp_path: Path, uninterrupted: Model
) -> None:
    root, keys = damaged
    module = data(root, base, num_workers=workers, max_skip_rate=0.05)
    model = fit(module, tmp_path / "run")
    found = []
    for batch, clean in zip(model.batches, uninterrupted.batches, strict=True):
        assert batch.rows == clean.rows, "a bad row is masked, not replaced"
        assert torch.equal(batch.query.valid, batch.target.valid)
        assert int((~batch.query.valid).sum()) == len(batch.skipped)
        assert torch.equal(batch.query.content_ids[batch.query.valid], clean.query.content_ids[batch.query.valid])
        found += [key for key, reason in batch.skipped if "not the ones indexed" in reason]
    lines = [json.loads(line) for line in (tmp_path / "run/quarantine-0.jsonl").read_text().splitlines()]
    dev = [key for batch in model.dev for key, _ in batch.skipped]
    assert found
    assert set(found) | set(dev) == {line["key"] for line in lines} <= set(keys)
    assert len(lines) == len({line["key"] for line in lines}), "each is written once"
    assert module.skipped["talk"] == len(found) + len(dev)
    # A replay agrees, and so does one with the bytes mended: what was masked stays masked.
    mended = fit(data(root.parent / "damaged", base, max_skip_rate=0.05), tmp_path / "run")
    assert [b.query.valid.tolist() for b in mended.batches] == [b.query.valid.tolist() for b in model.batches]


def test_a_transient_fault_replays_as_it_was(shards: Path, base: str, tmp_path: Path) -> None:
    """A row that failed once (and would be read now) is masked in that step and in later epochs, and nowhere else."""
    clean = fit(data(shards, base), tmp_path / "clean").batches
    twice = [b for b in clean if b.source == "stills"]
    assert len({b.epoch for b in twice}) == 2
    quarantine = Quarantine(tmp_path)
    quarantine.add("stills_000000_0003", 0, 4, "gone for a moment")
    for epoch, step, masked in ((0, 3, False), (0, 4, True), (0, 5, False), (1, 0, True), (1, 4, True)):
        assert bool(quarantine.reason("stills_000000_0003", epoch, step)) is masked
    (tmp_path / "quarantine-7.jsonl").write_text('{"key": "a", "epoch": 0, "step": 1, "reason": "r"}\n{"key": "b", "ep')
    again = Quarantine(tmp_path)
    assert again.reason("stills_000000_0003", 1, 0) == "gone for a moment"
    assert again.reason("a", 0, 1) == "r", "all ranks' files count; a half-written line does not"


def test_too_many_bad_samples_stop_the_run(damaged: tuple[Path, list[str]], base: str, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"could not be read, max_skip_rate is 0.001; the last one: talk_\d+_\d+: "):
        fit(data(damaged[0], base, max_skip_rate=0.001), tmp_path / "run")


def test_a_negative_that_cannot_be_read_is_left_out_alone(shards: Path, base: str, tmp_path: Path) -> None:
    module = data(shards, base)
    module.setup()
    build = module.train_dataloader()._build
    prepare = build.builder.prepare
    bad = Item.of("not 3 1")

    def fail(item: Item) -> Any:
        if item == bad:
            raise InputError("no")
        return prepare(item)

    build.builder.prepare = fail  # type: ignore[method-assign]
    rows = replace(module._begin_epoch().rows(0), source=2, places=((0, 0, 3), (0, 1, 2)))
    batch = replace(build, negatives=[0, 0, 3])(rows)
    assert batch.negative_index.tolist() == [[0, -1, 1], [2, 3, -1]]
    assert bool(batch.query.valid.all())
    assert batch.skipped[0][0].startswith("talk_000000_0003#")


class Killer:
    """Stands for a decoder that aborts or hangs at one sample: forever, or once (until the fuse file exists)."""

    def __init__(self, read: Any, key: str, fuse: Path | None, hang: bool = False) -> None:
        self.read, self.key, self.fuse, self.hang = read, key, fuse, hang

    def __call__(self, build: StepBuilder, source: Any, key: str, rows: Rows, place: Any) -> Pair:
        masked = build.quarantine.reason(key, rows.epoch, rows.step)
        if key == self.key and not masked and not (self.fuse and self.fuse.exists()):
            if self.fuse:
                self.fuse.touch()
            if self.hang:
                time.sleep(1000)
            os.kill(os.getpid(), signal.SIGKILL)
        return self.read(build, source, key, rows, place)


@pytest.mark.parametrize("case", ["dies once", "hangs once", "dies always"])
def test_a_lost_worker_is_started_again(
    case: str, uninterrupted: Model, shards: Path, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = data(shards, base)
    module.setup()
    step = module._begin_epoch().rows(3)
    key = open_sources(shards)[module.sources[step.source]].key(step.places[1][2])
    killer = Killer(StepBuilder._read, key, tmp_path / "fuse" if "once" in case else None, "hangs" in case)
    monkeypatch.setattr(StepBuilder, "_read", lambda *words: killer(*words))
    # torch looks for dead workers every 5 s; the test need not wait that long.
    looks = torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(looks, "__defaults__", (0.2,))
    if killer.hang:
        start = StepLoader.__init__
        monkeypatch.setattr(StepLoader, "__init__", lambda *words, **named: start(*words, **named, timeout_s=2.0))
    batches = fit(data(shards, base, num_workers=2), tmp_path / "run", max_epochs=1).batches
    assert steps(batches) == ALL[:12]
    if "once" in case:
        assert killer.fuse is not None
        assert killer.fuse.exists()
        assert same(batches, uninterrupted.batches[:12])
        return
    assert batches[3].query.valid.tolist() == [True, False, *[True] * (len(batches[3]) - 2)]
    assert batches[3].skipped == ((key, "a loader worker was lost at it twice"),)
    assert same(batches[:3] + batches[4:], uninterrupted.batches[:3] + uninterrupted.batches[4:12])


def test_an_error_of_the_code_is_not_taken_for_a_lost_worker(
    shards: Path, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Pair:
        raise RuntimeError("a bug")

    monkeypatch.setattr(StepBuilder, "_read", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        fit(data(shards, base, num_workers=2), tmp_path)


# -------------------------------------------------------------------------------------------------------------- ranks


def rank_main(rank: int, port: int, root: Path, base: str, folder: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"NODE_RANK": "0"}
    torch.set_num_threads(1)
    model = fit(data(root, base), folder, max_epochs=1, devices=2, strategy="ddp")
    (folder / f"{rank}.pickle").write_bytes(
        pickle.dumps([(b.source, b.rows, b.query.content_ids.tolist(), b.seed) for b in model.batches + model.dev])
    )


def test_two_ranks_share_each_global_batch(uninterrupted: Model, shards: Path, base: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Forked: a spawned rank would import torch and Lightning again.
    mp.start_processes(rank_main, (port, shards, base, tmp_path), nprocs=2, start_method="fork")
    ranks = [pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()) for rank in range(2)]
    whole = uninterrupted.batches[:12] + uninterrupted.dev[:3]
    for one, first, second in zip(whole, *ranks, strict=True):
        assert (first[0], second[0]) == (one.source, one.source)
        assert first[1] == one.rows[0::2]
        assert second[1] == one.rows[1::2]
        assert first[2] == one.query.content_ids.tolist()[0::2]
        assert first[3] != second[3]


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps_per_epoch": 0}, "data.steps_per_epoch is 0"),
        ({"batch_size": {"talk": 4}}, "no value for source clips"),
        ({"batch_size": 100}, "a global batch of 100 from 36"),
        ({"inputs": POLICY.replace(sampling=Sampling.uniform(8))}, r"--presample 'uniform\(8\)'"),
        ({"base": "nowhere"}, "base 'nowhere'"),
        ({"root": "nowhere"}, "holds no manifest"),
    ],
)
def test_bad_settings_are_one_clear_line(changes: dict[str, Any], message: str, shards: Path, base: str) -> None:
    changes = {"root": shards, "base": base, **changes}
    with pytest.raises(InputError, match=message) as caught:
        data(changes.pop("root"), changes.pop("base"), **changes).setup()
    assert "\n" not in str(caught.value)


def test_accumulated_batches_are_refused(shards: Path, base: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="accumulate_grad_batches"):
        fit(data(shards, base), tmp_path, accumulate_grad_batches=2)


def test_fewer_frames_are_the_nearest_stored() -> None:
    pixels = np.arange(8, dtype=np.uint8).repeat(12).reshape(8, 2, 2, 3)
    indices = np.linspace(0, 99, 8).round().astype(np.int64)  # 0 14 28 42 57 71 85 99
    item = Item((Video(Frames(pixels, indices / 25.0, indices, 100, 25.0)),))
    thinned = loader_module.thin(item, Sampling.uniform(4)).parts[0].source
    # uniform(4) of 100 frames asks for 0, 33, 66, 99; nearest stored: 0, 28, 71, 99.
    assert thinned.indices.tolist() == [0, 28, 71, 99]
    assert thinned.pixels[:, 0, 0, 0].tolist() == [0, 2, 5, 7]
    assert thinned.times_s.tolist() == [0.0, 28 / 25, 71 / 25, 99 / 25]


def test_loader_iterators_start_late(shards: Path, base: str) -> None:
    """Lightning calls iter() before the curriculum of the epoch is final."""
    module = data(shards, base)
    module.setup()
    iterator: Iterator[TrainBatch] = iter(module.train_dataloader())
    module.set_scores(0, {"T2T": 0.0, "T2I": 9.0, "T2V": 0.0})
    assert {next(iterator).task for _ in range(6)} == {"T2I"}
