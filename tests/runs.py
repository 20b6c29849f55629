"""Whole runs in processes of their own, made to be killed: forked from a server that has the imports behind it."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as L

from gve.cli import main
from gve.data.datamodule import PyramidDataModule
from gve.data.sources import Source

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["gve.lightning_cli", "gve.model.embedder", "tensorboard"])


def start(words: Sequence[Any], log: Path, *, ranks: int = 1, env: dict[str, str] | None = None) -> list[BaseProcess]:
    """Starts `gve <words>`, one process a rank (as torchrun does it); what they print goes to <log>.<rank>."""
    shared = dict(env or {})
    if ranks > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        words = [*words, "--trainer.devices", ranks, "--trainer.strategy", "ddp"]
    processes: list[BaseProcess] = []
    for rank in range(ranks):
        own = {**shared, "LOCAL_RANK": str(rank), "NODE_RANK": "0"} if ranks > 1 else shared
        processes.append(_FORKS.Process(target=_run, args=([str(word) for word in words], f"{log}.{rank}", own)))
        processes[-1].start()
    return processes


def wait(processes: list[BaseProcess], seconds: float) -> list[int]:
    """Exit codes; a run that is still alive after so long has hung: it is killed and the test fails."""
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    hung = [process for process in processes if process.is_alive()]
    for process in hung:
        process.kill()
        process.join()
    assert not hung, f"{len(hung)} of {len(processes)} ranks hung"
    return [process.exitcode or 0 for process in processes]


def run(words: Sequence[Any], log: Path, *, seconds: float = 120.0, ranks: int = 1, **env: str) -> list[int]:
    """Runs to the end; exit codes of the ranks, -9 for one that was killed."""
    return wait(start(words, log, ranks=ranks, env=env), seconds)


def history(folder: Path, ranks: int = 1) -> dict[int, list[dict[str, Any]]]:
    """Step -> what each rank trained on and its loss, of a run with --record.steps true."""
    found: dict[int, list[dict[str, Any]]] = {}
    for rank in range(ranks):
        for line in (folder / f"steps-{rank}.jsonl").read_text().splitlines():
            entry = json.loads(line)
            found.setdefault(entry.pop("step"), []).append(entry)
    return found


def _run(words: list[str], log: str, env: dict[str, str]) -> None:
    os.environ.update(env)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["gve", *words]
    multiprocessing.set_start_method("fork", force=True)  # as in a process that a user starts
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so do children
    main(words)


class Fault(L.Callback):
    """Once in a run folder, something happens to one rank: GVE_FAULT = "<place>:<step>:<rank>:<signal>".

    Places: "start" of a step (counted over the run, from 0), behind its "forward" or "backward" pass; "validation";
    "probe": as the scores of an epoch have been measured; "write": when a checkpoint is half on the disk; "rename":
    when the old one has been renamed and the new one not yet.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        fault = os.environ["GVE_FAULT"]
        self.place, step, rank, name = fault.split(":")
        self.step, self.signal = int(step), getattr(signal, name)
        self.marker = Path(trainer.default_root_dir) / f"fault {fault}"
        self.armed = trainer.global_rank == int(rank) and not self.marker.exists()
        self.trainer = trainer
        if not self.armed:
            return
        fsync, replace, set_scores = os.fsync, os.replace, PyramidDataModule.set_scores

        def half(descriptor: int) -> None:
            if self.due("write") and os.readlink(f"/proc/self/fd/{descriptor}").endswith(".ckpt.tmp"):
                os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
                self.strike("write")
            fsync(descriptor)

        def between(source: Any, target: Any) -> None:
            if Path(target).name == "last.ckpt":
                self.strike("rename")
            replace(source, target)

        def scored(data: PyramidDataModule, epoch: int, scores: Any) -> None:
            self.strike("probe")
            set_scores(data, epoch, scores)

        for place, name, stand_in in (
            (os, "fsync", half),
            (os, "replace", between),
            (PyramidDataModule, "set_scores", scored),
        ):
            mock.patch.object(place, name, stand_in).start()

    def due(self, place: str) -> bool:
        return self.armed and place == self.place and self.trainer.global_step >= self.step

    def strike(self, place: str) -> None:
        if self.due(place):
            self.armed = False
            self.marker.touch()
            os.kill(os.getpid(), self.signal)

    def on_train_batch_start(self, *rest: Any) -> None:
        self.strike("start")

    def on_after_backward(self, *rest: Any) -> None:
        self.strike("backward")

    def on_before_zero_grad(self, *rest: Any) -> None:
        self.strike("forward")

    def on_validation_batch_start(self, *rest: Any) -> None:
        self.strike("validation")


class Hold(L.Callback):
    """Stops before the fourth step, in the run folder's files `holding` and `go`: until there is a `go`."""

    def on_train_batch_start(self, trainer: L.Trainer, *rest: Any) -> None:
        folder = Path(trainer.default_root_dir)
        if trainer.global_step == 3 and not (folder / "go").exists():
            (folder / "holding").touch()
            while not (folder / "go").exists():
                time.sleep(0.05)


class Damage(L.Callback):
    """What a disk and a decoder do to a run, by GVE_DAMAGE, JSON.

    `cut`: [file, bytes]: the shard is cut off as training begins. `abort`: the worker that reads this sample dies of
    SIGABRT, every time, as in a decoder's failed assertion. `kill`: [sample, file]: it is killed -9 once.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.damage = json.loads(os.environ["GVE_DAMAGE"])
        read = Source.read

        def dying(source: Source, row: int, **options: Any) -> Any:
            key = source.key(row)
            if key == self.damage.get("abort"):
                os.kill(os.getpid(), signal.SIGABRT)
            sample, marker = self.damage.get("kill", ("", ""))
            if key == sample and not Path(marker).exists():
                Path(marker).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return read(source, row, **options)

        mock.patch.object(Source, "read", dying).start()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if "cut" in self.damage:
            os.truncate(*self.damage["cut"])
