"""A short fit in a child process, and what its meters say: `python -m gve.bench.fit SETTINGS`, used by benches."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gve.bench.stock import prepare_torchvision
from gve.items import InputError

SECONDS = 900  # after which a fit counts as hung


@dataclass(frozen=True)
class ShortFit:
    """A fit of the base that gve carries.

    Args:
        root: shard folder.
        folder: of the run.
        steps: how many; the meters tell of the second half.
        batch: global rows of a step.
        workers: loader processes of a rank.
        ranks: processes, each with one thread.
        frames: of a clip.
        frame_tokens: most of a frame.
    """

    root: str
    folder: str
    steps: int = 24
    batch: int = 4
    workers: int = 2
    ranks: int = 1
    frames: int = 8
    frame_tokens: int = 200


def meters_of(fit: ShortFit) -> dict[str, float]:
    """Runs it.

    Returns:
        values of gve.callbacks.throughput by their names, and growth_mb: how much the resident memory of rank 0 grew
        from a quarter of the steps to the end, in MiB.

    Raises:
        InputError: the run failed; says how.
    """
    command = [sys.executable, "-m", "gve.bench.fit", json.dumps(dataclasses.asdict(fit))]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=env, check=False)
    if done.returncode:
        raise InputError(f"a fit of this bench failed: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")
    return json.loads(Path(fit.folder, "meters.json").read_text())


def _run(fit: ShortFit) -> None:
    import lightning.pytorch as L
    import torch
    from lightning.pytorch.loggers.logger import DummyLogger

    from gve.callbacks import Throughput
    from gve.data.datamodule import PyramidDataModule
    from gve.inputs import InputPolicy
    from gve.model.embedder import VideoEmbedder
    from gve.toy.base import EMBEDDED
    from gve.video import Sampling

    class Meters(DummyLogger):
        """Keeps the last value of each name."""

        def __init__(self) -> None:
            super().__init__()
            self.values: dict[str, float] = {}

        def log_metrics(self, metrics: dict[str, float], *rest: Any, **named: Any) -> None:
            self.values |= {name.removeprefix("throughput/"): float(value) for name, value in metrics.items()}

    class Memory(L.Callback):
        """Largest resident memory of the first quarter and of all steps, in MiB."""

        first = last = 0.0

        def on_train_batch_end(self, trainer: L.Trainer, *rest: Any) -> None:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.last = max(self.last, pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
            if trainer.global_step <= fit.steps // 4:
                self.first = self.last

    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    policy = InputPolicy(sampling=Sampling.uniform(fit.frames), max_frame_tokens=fit.frame_tokens)
    meters, memory = Meters(), Memory()
    trainer = L.Trainer(
        default_root_dir=fit.folder,
        max_epochs=1,
        accelerator="cpu",
        devices=fit.ranks,
        strategy="ddp" if fit.ranks > 1 else "auto",
        logger=meters,
        log_every_n_steps=max(1, fit.steps // 2),
        callbacks=[Throughput(), memory],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    data = PyramidDataModule(
        fit.root,
        str(EMBEDDED),
        policy,
        steps_per_epoch=fit.steps,
        num_epochs=1,
        batch_size=fit.batch,
        num_workers=fit.workers,
        dev_pairs=0,
    )
    trainer.fit(VideoEmbedder(str(EMBEDDED), policy), datamodule=data)
    if trainer.is_global_zero:
        values = {**meters.values, "growth_mb": memory.last - memory.first}
        Path(fit.folder, "meters.json").write_text(json.dumps(values))


if __name__ == "__main__":
    prepare_torchvision()
    _run(ShortFit(**json.loads(sys.argv[1])))
