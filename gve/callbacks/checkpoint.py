"""Checkpoints of a run: written whole or not at all, found again by one rule, saved before the run is preempted."""

from __future__ import annotations

import math
import os
import shutil
import time
import zipfile
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from gve.callbacks.preemption import Preempted, StopSignals
from gve.encode.pretrained import read_checkpoint
from gve.items import InputError

NEWEST_FIRST = ("new", "last", "previous", "best")
"""Names of a run's checkpoints. "new" exists between two renames only, so after a kill at that moment."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a local checkpoint beside its place, on the disk, and then under its name.

    Lightning writes into the machine's temporary folder and moves the file, which is a copy, not a rename, where that
    is another disk; and holds the bytes once more in memory. Other addresses (s3://) are left to it.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(path.name + ".tmp")
        with open(draft, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
        _sync_folder(path.parent)


class RunCheckpoints(Checkpoint):
    """Saves the whole state of a run, and stops the run in good order when its machine is wanted back.

    In the folder lie `last.ckpt` (the newest state), `previous.ckpt` (the one before it, should the disk have hurt the
    newest) and `best.ckpt` (that of the best epoch by `monitor`). `last` is saved every n steps and every m minutes (a
    node that is lost sends no signal), before the last step of an epoch, and when an epoch is over: after its
    validation, and after the probe has weighed the next epoch. It is not saved at an epoch's last step itself, from
    where a resume would skip validation and probe; a run that dies in them repeats one step.

    SIGTERM and SIGUSR1: at the end of the step in which any rank has heard one, all ranks save and raise Preempted. In
    an epoch's last step nothing is saved (see above), in validation the epoch's end is waited for.

    Args:
        dirpath: the folder; linked from trainer.default_root_dir.
        every_n_train_steps: steps between two saves; 0: no more than said above.
        every_n_minutes: longest time between two saves, by the clock of the rank that sees it first; 0: none.
        monitor: what the best checkpoint is best by; null: none is kept. A value of `uvrb/` is refused, it is the test.
        mode: whether the least or the greatest is best.
    """

    def __init__(
        self,
        dirpath: str,
        every_n_train_steps: int = 200,
        every_n_minutes: float = 15.0,
        monitor: str | None = "val/loss",
        mode: Literal["min", "max"] = "min",
    ) -> None:
        if every_n_train_steps < 0:
            raise InputError(f"checkpoint.every_n_train_steps={every_n_train_steps}: use 0 or more")
        if not 0 <= every_n_minutes < math.inf:
            raise InputError(f"checkpoint.every_n_minutes={every_n_minutes}: use 0 or more")
        if monitor is not None and monitor.startswith("uvrb"):
            raise InputError(f"checkpoint.monitor={monitor} would choose weights on the benchmark: use val/loss")
        self.folder = Path(dirpath)
        self.every_n_train_steps, self.every_n_minutes = every_n_train_steps, every_n_minutes
        self.monitor, self.mode = monitor, mode
        self._saved_at = time.monotonic()
        self._best: float | None = None
        self._best_step = -1
        self._signals = StopSignals()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._signals.listen()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compares what the ranks begin with.

        Raises:
            InputError: they found different checkpoints (a shared disk may show them different folders).
        """
        chosen = trainer.strategy.broadcast(trainer.ckpt_path)
        if chosen != trainer.ckpt_path:
            raise InputError(f"rank {trainer.global_rank} found checkpoint {trainer.ckpt_path}, rank 0 found {chosen}")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Lightning has put its own handler of SIGTERM there meanwhile, which starts a collective wherever it is called.
        self._signals.listen()
        self._saved_at = time.monotonic()
        if not trainer.is_global_zero:
            return
        if trainer.ckpt_path is None:
            self._set_aside()
            return
        rank_zero_info(
            f"goes on from {trainer.ckpt_path}: epoch {trainer.current_epoch}, {trainer.global_step} steps done"
        )
        if self._best_step == trainer.global_step:
            # The run may have died between saving the state and giving it its second name.
            _share(Path(trainer.ckpt_path), self.folder / "best.ckpt")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        left = int(trainer.num_training_batches) - batch_idx - 1
        late = self.every_n_minutes > 0 and time.monotonic() - self._saved_at >= 60 * self.every_n_minutes
        stopped_by, late = self._signals.agreed(trainer, late)
        due = self.every_n_train_steps and trainer.global_step % self.every_n_train_steps == 0
        if left and (stopped_by or late or due or left == 1):
            self._save(trainer)
        if stopped_by:
            self._stop(trainer, stopped_by)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        improved = self._improved(trainer)
        self._save(trainer)
        if improved and trainer.is_global_zero:
            _share(self.folder / "last.ckpt", self.folder / "best.ckpt")
        finished = trainer.max_epochs is not None and 0 <= trainer.max_epochs <= trainer.current_epoch + 1
        stopped_by, _ = self._signals.agreed(trainer)
        if stopped_by and not finished:
            self._stop(trainer, stopped_by)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        # A cluster that repeats its signal must not turn the exit code of a run that has saved into another one.
        self._signals.leave(deaf=isinstance(exception, Preempted))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._signals.leave()

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "best_step": self._best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._best, self._best_step = state_dict["best"], state_dict["best_step"]

    def _save(self, trainer: L.Trainer) -> None:
        new, last, previous = (self.folder / f"{name}.ckpt" for name in NEWEST_FIRST[:3])
        trainer.save_checkpoint(new, weights_only=False)
        self._saved_at = time.monotonic()
        if trainer.is_global_zero:
            if last.exists():
                _replace(last, previous)
            _replace(new, last)
            _sync_folder(self.folder)

    def _stop(self, trainer: L.Trainer, by: str) -> None:
        rank_zero_info(f"stopped by {by} after step {trainer.global_step}: `--ckpt_path auto` goes on from here")
        raise Preempted(by, trainer.global_rank)

    def _improved(self, trainer: L.Trainer) -> bool:
        if self.monitor is None or self.monitor not in trainer.callback_metrics:
            return False
        value = float(trainer.callback_metrics[self.monitor])
        if math.isnan(value):
            return False
        if self._best is not None and not (value < self._best if self.mode == "min" else value > self._best):
            return False
        self._best, self._best_step = value, trainer.global_step
        return True

    def _set_aside(self) -> None:
        """A run that starts anew moves the checkpoints of an earlier one: none may be taken for its own."""
        if not any((self.folder / f"{name}.ckpt").exists() for name in NEWEST_FIRST):
            return
        number = 1
        while (aside := self.folder.with_name(f"{self.folder.name}-{number}")).exists():
            number += 1
        os.replace(self.folder, aside)
        rank_zero_warn(f"a new run in the folder of an old one: the old checkpoints are in {aside} now")


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The newest whole checkpoint that RunCheckpoints has left in a folder; None where it has left none.

    One that is damaged is named in a warning and the one before it is taken.

    Raises:
        InputError: there are some, but none is whole; or they are folders (sharded, DeepSpeed), which only their
            program can judge.
    """
    broken = []
    for path in (Path(folder) / f"{name}.ckpt" for name in NEWEST_FIRST):
        if path.is_dir():
            raise InputError(f"{path} is a sharded checkpoint, which `auto` cannot check: give it as --ckpt_path")
        if not path.exists():
            continue
        try:
            require_checkpoint(path)
        except InputError as error:
            broken.append(path.name)
            rank_zero_warn(f"{error}; the one before it is tried")
            continue
        return path
    if broken:
        raise InputError(f"no checkpoint in {folder} is whole ({', '.join(broken)}): remove them to start anew")
    return None


def require_checkpoint(path: str | Path) -> None:
    """Refuses a file that is no whole checkpoint of gve. Whether it fits the model is checked when it is loaded.

    Raises:
        InputError: what is wrong with it.
    """
    if "://" in str(path):
        return
    read_checkpoint(path)
    try:
        # torch reads past a wrong checksum: a hurt file would give other weights, not an error.
        with zipfile.ZipFile(path) as archive:
            hurt = archive.testzip()
    except (OSError, zipfile.BadZipFile):
        raise InputError(f"{path} is no checkpoint that can be loaded as plain tensors: give one of gve fit") from None
    if hurt is not None:
        raise InputError(f"checkpoint {path} is damaged: the checksum of {hurt} is wrong")


def _replace(source: Path, target: Path) -> None:
    """Renames a checkpoint over another one; a folder, as sharded strategies write it, is removed first."""
    if target.is_dir():
        shutil.rmtree(target)
    os.replace(source, target)


def _share(source: Path, target: Path) -> None:
    """A second name for the same state: a link to the same bytes, a copy where the disk knows no links."""
    draft = target.with_name(target.name + ".tmp")
    if source.is_dir():
        shutil.rmtree(draft, ignore_errors=True)
        shutil.copytree(source, draft)
    else:
        draft.unlink(missing_ok=True)
        try:
            os.link(source, draft)
        except OSError:
            shutil.copyfile(source, draft)
    _replace(draft, target)


def _sync_folder(folder: Path) -> None:
    """Makes renames in a folder survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
