"""run.json: what was run, by which code, on what, and when."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch

import gve
from gve.callbacks.preemption import Preempted
from gve.items import TrainBatch

PACKAGES = ("torch", "lightning", "transformers", "peft", "numpy", "av", "decord", "webdataset", "safetensors")


class RunRecord(L.Callback):
    """Writes run.json into trainer.default_root_dir: one entry for every attempt, in the order of their starts.

    An entry has the command, the commit and whether the tree was changed, versions, hardware, seed, hash of the
    resolved configuration, world size, the checkpoint it went on from and at which step, start, end, and how it ended:
    "running" remains where a process was killed.

    Args:
        steps: also write `steps-<rank>.jsonl`, a line for every step behind the weights: loss of this rank, source, and
            the (pass, position) of its rows. What an attempt did after its last checkpoint is cut off by the next
            one, so the file of a run with interruptions equals that of one without. Costs a host sync each step.
    """

    def __init__(self, steps: bool = False) -> None:
        self.steps = steps
        self._entry: dict[str, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._entry = {
            "stage": stage,
            "status": "running",
            "start": _now(),
            "end": None,
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "commit": commit_of_code(),
            "versions": {"gve": gve.__version__, "python": platform.python_version(), **versions_of(PACKAGES)},
            "hardware": _hardware(),
            "seed": int(seed) if (seed := os.environ.get("PL_GLOBAL_SEED")) else None,
            "config": None,
            "world_size": trainer.world_size,
            "resumed_from": None,
            "first_step": 0,
            "step": trainer.global_step,
        }
        self._write(trainer, new=True)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.ckpt_path is not None:
            self._entry |= {"resumed_from": str(trainer.ckpt_path), "first_step": trainer.global_step}
            self._write(trainer, new=False)
        if self.steps:
            _cut(self._steps_file(trainer), trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: TrainBatch, batch_idx: int
    ) -> None:
        if not self.steps:
            return
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        entry = {"step": trainer.global_step - 1, "loss": float(loss), "source": batch.source, "rows": batch.rows}
        with open(self._steps_file(trainer), "a") as file:
            file.write(json.dumps(entry) + "\n")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end(trainer, "done")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._entry["stage"] == "validate":
            self._end(trainer, "done")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end(trainer, "done")

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end(trainer, "done")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self._entry:
            kind = "preempted" if isinstance(exception, Preempted) else type(exception).__name__
            self._end(trainer, f"{kind}: {exception}".split("\n")[0])

    def _end(self, trainer: L.Trainer, status: str) -> None:
        # An interrupt inside fit is reported and followed by the end of fit: the first word stands.
        if self._entry["end"] is None:
            self._entry |= {"status": status, "end": _now(), "step": trainer.global_step, "config": _config(trainer)}
            self._write(trainer, new=False)

    @staticmethod
    def _steps_file(trainer: L.Trainer) -> Path:
        return Path(trainer.default_root_dir) / f"steps-{trainer.global_rank}.jsonl"

    def _write(self, trainer: L.Trainer, *, new: bool) -> None:
        if not trainer.is_global_zero:
            return
        path = Path(trainer.default_root_dir) / "run.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        attempts = json.loads(path.read_text())["attempts"] if path.is_file() else []
        attempts = [*attempts, self._entry] if new else [*attempts[:-1], self._entry]
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps({"attempts": attempts}, indent=1) + "\n")
        os.replace(draft, path)


def _cut(path: Path, step: int) -> None:
    """Leaves the lines of the first `step` steps."""
    kept = []
    for line in path.read_text().splitlines(keepends=True) if step and path.is_file() else []:
        try:
            if json.loads(line)["step"] < step:
                kept.append(line)
        except json.JSONDecodeError:
            continue  # the last line of a killed process
    draft = path.with_suffix(".tmp")
    draft.write_text("".join(kept))
    os.replace(draft, path)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _config(trainer: L.Trainer) -> dict[str, str] | None:
    """File and SHA-256 of the configuration that the command line has saved beside run.json."""
    stage = trainer.state.fn.value if trainer.state.fn else "fit"
    path = Path(trainer.default_root_dir) / ("config.yaml" if stage == "fit" else f"config_{stage}.yaml")
    if not path.is_file():
        return None
    return {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def commit_of_code() -> dict[str, Any] | None:
    """Commit of the code and whether the tree differs from it; None where the code is not in a git checkout."""
    snapshot = Path(gve.__file__).resolve().parents[1] / "snapshot.json"
    if snapshot.is_file():  # code that was copied for a job (gve slurm)
        return json.loads(snapshot.read_text())["commit"]
    if shutil.which("git") is None:
        return None
    folder = Path(gve.__file__).resolve().parent

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, check=False, timeout=20
        )

    head, status = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    if head.returncode or status.returncode:
        return None
    return {"hash": head.stdout.strip(), "dirty": bool(status.stdout.strip())}


def versions_of(packages: Sequence[str]) -> dict[str, str | None]:
    """Installed version of each distribution; None where it is absent."""

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {name: installed(name) for name in packages}


def _hardware() -> dict[str, Any]:
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"machine": platform.machine(), "cpus": os.cpu_count(), "threads": torch.get_num_threads(), "gpus": devices}
