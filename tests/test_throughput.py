"""The clock of a step's phases by hand, and what a fit logs of its speed."""

from __future__ import annotations

import time
import types
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch.utils.data import DataLoader, Dataset

import gve.video
from gve.callbacks import Throughput, throughput
from gve.data.datamodule import PyramidDataModule
from gve.data.manifest import Presample
from gve.data.shards import ShardWriter
from gve.inputs import InputPolicy
from gve.items import Frames, Item, Pair, TrainBatch
from gve.model.backbone import Lora
from gve.model.clock import CLOCK, PhaseClock
from gve.model.embedder import VideoEmbedder
from gve.toy.base import EMBEDDED
from gve.video import Sampling, decode_stored_frames
from test_embedder import Pairs, embedder

POLICY = InputPolicy(sampling=Sampling.uniform(2), max_frame_tokens=4)


def test_phases_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """A phase inside another is taken out of it; nothing is measured before the start, in a pause, after the stop."""
    clock, now = PhaseClock(), iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(now)))
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    with clock.phase("loss"):
        clock.count_tokens(mask)
    clock.start(torch.device("cpu"))
    clock.enter("loss")  # 0 to 1, then 2 to 3
    with clock.phase("comm"):  # 1 to 2
        clock.count_tokens(mask)
    clock.leave()
    with clock.phase("comm"):  # 4 to 5
        pass
    clock.pause()
    with clock.phase("tower"):
        clock.count_tokens(torch.zeros(50, 50))
    clock.resume()
    clock.count_tokens(mask[:1])
    seconds, padding = clock.read()
    assert seconds == {"loss": 2.0, "comm": 2.0}
    assert padding == pytest.approx(1 - 7 / 12)
    clock.leave()  # nothing is open
    clock.stop()
    clock.resume()  # a stop is no pause
    with clock.phase("loss"):
        pass
    assert clock.read()[0] == {}


class Late(Dataset[TrainBatch]):
    """Four steps; 60 ms are waited for each but the first."""

    def __getitem__(self, step: int) -> TrainBatch:
        time.sleep(0.06 if step else 0)
        return Pairs(4).step(step)

    def __len__(self) -> int:
        return 4


class Memory(DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.logged: dict[str, float] = {}

    def log_metrics(self, metrics: dict[str, float], *args: Any, **kwargs: Any) -> None:
        self.logged |= metrics


@pytest.mark.parametrize("chunk_tokens", [0, 12])
def test_a_fit_logs_its_phases(base: str, tmp_path: Path, chunk_tokens: int) -> None:
    logger = Memory()
    run = L.Trainer(
        default_root_dir=tmp_path,
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=logger,
        log_every_n_steps=4,
        callbacks=[Throughput()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    begun = time.perf_counter()
    run.fit(embedder(base, lora=Lora(rank=4, alpha=8), chunk_tokens=chunk_tokens), DataLoader(Late(), batch_size=None))
    took_s = time.perf_counter() - begun
    found = {name.removeprefix("throughput/"): v for name, v in logger.logged.items() if name.startswith("throughput/")}
    seconds = 4 * 4 / found["pairs_per_s"]
    assert seconds < took_s
    # Three waits of 60 ms; Lightning's own work between two steps is in it.
    assert 0.18 < found["data_wait_share"] * seconds < seconds
    # Both sides of a step have 4 rows of 6 tokens, every other step 2 negatives of 6; none is padding.
    assert found["tokens_per_s"] * seconds == pytest.approx(4 * 48 + 2 * 12)
    assert found["padding_share"] == 0
    phases = {name: found[f"{name}_s"] for name in ("tower", "decoder", "loss", "comm", "optimizer")}
    assert phases.pop("comm") == 0  # one process has nobody to talk to
    assert min(phases.values()) > 0
    assert max(phases, key=lambda name: phases[name]) == "decoder"
    assert 4 * sum(phases.values()) < seconds * (1 - found["data_wait_share"])
    assert 100 < found["peak_memory_mb"] < 100_000
    with CLOCK.phase("loss"):
        pass
    assert CLOCK.read()[0] == {}  # it ended with the fit


def stall_share(root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, decode_s: float) -> float:
    """`data_wait_share` of a fit of 4 steps of 2 stored clips, on a clock that only decoding and steps move forward."""
    clock = [0.0]

    def decode(*arguments: Any) -> np.ndarray:
        clock[0] += decode_s
        return decode_stored_frames(*arguments)

    def step(*arguments: Any) -> Any:
        clock[0] += 0.1
        return training_step(*arguments)

    found: dict[str, float] = {}
    training_step = VideoEmbedder.training_step
    with monkeypatch.context() as patch:
        patch.setattr(throughput, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
        patch.setattr(gve.video, "decode_stored_frames", decode)
        patch.setattr(VideoEmbedder, "training_step", step)
        logger = DummyLogger()
        patch.setattr(logger, "log_metrics", lambda metrics, *_, **__: found.update(metrics))
        trainer = L.Trainer(
            default_root_dir=folder, max_epochs=1, accelerator="cpu", devices=1, logger=logger, log_every_n_steps=4,
            callbacks=[Throughput()], enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, num_sanity_val_steps=0,
        )  # fmt: skip
        data = PyramidDataModule(
            str(root), str(EMBEDDED), POLICY, steps_per_epoch=4, num_epochs=1, batch_size=2, num_workers=0, dev_pairs=0
        )
        trainer.fit(VideoEmbedder(str(EMBEDDED), POLICY), datamodule=data)
    return found["throughput/data_wait_share"]


def test_a_slow_decoder_raises_the_stall_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: 50 ms a clip, 2 clips a batch, 3 of 4 waits counted: 0.3 s of 0.3 + 4 steps of 0.1 s; and none without.

    The wait of an epoch's first batch is the loader's start and does not count.
    """
    frames = Frames(np.full((2, 28, 28, 3), 90, np.uint8), np.arange(2.0), np.arange(2), 2, 1.0)
    root = tmp_path / "shards"
    with ShardWriter(root, task="T2V", source="clips", presample=Presample(POLICY.sampling)) as writer:
        for number in range(4):
            writer.write(Pair(Item.of(f"a grey square {number}"), Item.of(video=frames)))
    assert stall_share(root, tmp_path / "slow", monkeypatch, 0.05) == pytest.approx(0.3 / 0.7)
    assert stall_share(root, tmp_path / "fast", monkeypatch, 0.0) == 0
