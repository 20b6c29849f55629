"""The clock of a step's phases by hand, and what a fit logs of its speed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch.utils.data import DataLoader, Dataset

from gve.callbacks import Throughput
from gve.items import TrainBatch
from gve.model.backbone import Lora
from gve.model.clock import CLOCK, PhaseClock
from test_embedder import Pairs, embedder


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
