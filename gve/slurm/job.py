"""What a job asks for, and what differs between clusters: the records that a batch script is rendered from."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from gve.items import InputError


@dataclass(frozen=True)
class Kind:
    """How a command of gve runs on a cluster.

    Args:
        command: the words after `gve`.
        ranks: one process for each device, all of one world; else one process for each task of an array.
        trainer: it is a command of LightningCLI: the Trainer's arguments are given, the configuration is frozen.
        driver: the batch shell runs it, and it starts its processes by srun (--launch).
    """

    command: tuple[str, ...]
    ranks: bool = True
    trainer: bool = False
    driver: bool = False


KINDS = {
    "fit": Kind(("fit",), trainer=True),
    "validate": Kind(("validate",), trainer=True),
    "uvrb": Kind(("uvrb", "run")),
    "sweep": Kind(("sweep", "run"), driver=True),
    "synth": Kind(("synth", "run"), ranks=False),
}
"""Name of a job -> how it runs."""

_WORD = re.compile(r"[\w.,:=@%+/\[\]-]+")
_TIME = re.compile(r"(?:(\d+)-)?(\d+):(\d{2})(?::(\d{2}))?")
_OWNED = {
    "trainer.num_nodes": "--nodes",
    "trainer.devices": "--devices",
    "trainer.strategy": "--strategy",
    "trainer.default_root_dir": "--run",
    "out": "--run",
}
"""Options of the command that the job sets -> the option of `gve slurm` that says it."""


@dataclass(frozen=True)
class Job:
    """One job: the sbatch lines and the command's arguments are both made of it, so they cannot disagree.

    Args:
        kind: a name of KINDS.
        folder: the run folder. It names the run, whatever SLURM calls its job: a requeued or resubmitted job goes on
            in it.
        words: further words of the command, as given.
        configs: configuration files of a fit or validate.
        nodes: machines.
        devices: GPUs of each node (processes, where there are no GPUs).
        accelerator: gpu or cpu.
        strategy: the Trainer's; its own choice where empty.
        time: limit of one attempt, [days-]hours:minutes:seconds.
        cpus_per_task: cores of each process.
        mem: memory of a node, such as 200G; what the cluster gives where empty.
        partition, account, qos: as of sbatch; those of the site where empty.
        signal_lead_s: seconds before the limit at which SIGUSR1 asks the run to save and stop; at least twice the time
            of a save and a step.
        max_restarts: how often the job may be started again, for whatever reason; then it fails.
        array: tasks of an array (sweep, synth); 0: no array.
        throttle: most tasks of the array at a time; 0: no bound.
    """

    kind: str
    folder: str
    words: tuple[str, ...] = ()
    configs: tuple[str, ...] = ()
    nodes: int = 1
    devices: int = 1
    accelerator: str = "gpu"
    strategy: str = ""
    time: str = "24:00:00"
    cpus_per_task: int = 8
    mem: str = ""
    partition: str = ""
    account: str = ""
    qos: str = ""
    signal_lead_s: int = 300
    max_restarts: int = 20
    array: int = 0
    throttle: int = 0

    def __post_init__(self) -> None:
        kind = self._kind
        for name, least in (("nodes", 1), ("devices", 1), ("cpus_per_task", 1), ("signal_lead_s", 0)):
            _at_least(name, getattr(self, name), least)
        for name in ("max_restarts", "array", "throttle"):
            _at_least(name, getattr(self, name), 0)
        for name in ("partition", "account", "qos", "mem"):
            value = getattr(self, name)
            if value and not _WORD.fullmatch(value):
                raise InputError(f"--{name} {value!r}: letters, digits and . , : = @ % + / [ ] - only")
        if not _WORD.fullmatch(self.folder):
            raise InputError(f"--run {self.folder!r}: a folder without spaces or quotes, as it names the job")
        if seconds_of(self.time) <= self.signal_lead_s:
            raise InputError(f"--time {self.time} is not longer than the {self.signal_lead_s} s of --signal-lead")
        if self.array and kind.ranks and not kind.driver:
            raise InputError(f"--array: {self.kind} is one run; sweep and synth share their work")
        if self.nodes > 1 and not kind.ranks:
            raise InputError(f"--nodes {self.nodes}: {self.kind} shares its work by --array, each task on one node")
        for word in self.words:
            option = word.split("=")[0].removeprefix("--")
            if word.startswith("--") and option in _OWNED and not kind.driver:
                raise InputError(f"--{option} is set by {_OWNED[option]}, which also asks SLURM for it")

    @property
    def tasks_per_node(self) -> int:
        """Processes of a node."""
        return self.devices if self._kind.ranks else 1

    @property
    def name(self) -> str:
        """The job's name. Jobs of one name wait for each other (singleton): none shares its run folder."""
        return f"gve-{self.kind}-{self.folder.strip('/').replace('/', '.')}"

    @property
    def state(self) -> str:
        """Folder of the job's script, logs, code and marker."""
        return f"{self.folder}/slurm/{self.kind}"

    @property
    def given_words(self) -> tuple[str, ...]:
        """The words as given; a sweep, whose runs have Trainers and folders of their own, is told the size by --set."""
        if not self._kind.driver:
            return self.words
        size = (f"trainer.num_nodes={self.nodes}", f"trainer.devices={self.devices}")
        words = self.words if "--set" in self.words else (*self.words, "--set")
        place = words.index("--set") + 1
        return (*words[:place], *size, *words[place:])

    @property
    def own_words(self) -> tuple[str, ...]:
        """Words that the job adds to the command: the Trainer's size, the run folder, the checkpoint."""
        if self._kind.driver:
            return ()
        if not self._kind.trainer:
            return ("--out", self.folder)
        size = ("--trainer.num_nodes", str(self.nodes), "--trainer.devices", str(self.devices))
        strategy = ("--trainer.strategy", self.strategy) if self.strategy else ()
        checkpoint = "auto" if self.kind == "fit" else f"{self.folder}/checkpoints/best.ckpt"
        given = any(word.split("=")[0] == "--ckpt_path" for word in self.words)
        found = () if given else ("--ckpt_path", checkpoint)
        return (*size, *strategy, "--trainer.default_root_dir", self.folder, *found)

    def digest(self, frozen: str = "") -> str:
        """What the job does, in 16 digits: a finished one is done again only where this has changed.

        Time, partition and the like are no part of it.

        Args:
            frozen: its resolved configuration.
        """
        share = f"{self.array} tasks"
        work = "\0".join((self.kind, self.folder, share, *self.configs, *self.words, frozen))
        return hashlib.sha256(work.encode()).hexdigest()[:16]

    @property
    def _kind(self) -> Kind:
        if self.kind not in KINDS:
            raise InputError(f"unknown kind of job {self.kind!r}: one of {', '.join(KINDS)}")
        return KINDS[self.kind]


@dataclass(frozen=True)
class Site:
    """What differs between clusters, read from one small file.

    Args:
        partition, account, qos: for jobs that name none.
        gpus: the sbatch option that asks for a node's GPUs, {devices} being their number; empty where there are none.
        sbatch: further sbatch options, such as --constraint=a100.
        srun: further srun options, such as --mpi=none.
        setup: shell lines before the command: modules, environment, network interfaces.
        python: the interpreter.
    """

    partition: str = ""
    account: str = ""
    qos: str = ""
    gpus: str = "--gpus-per-node={devices}"
    sbatch: tuple[str, ...] = ()
    srun: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    python: str = "python"
    source: str = field(default="", compare=False)


def read_site(path: str | Path) -> Site:
    """Reads a site file.

    Raises:
        InputError: it cannot be read, or has an unknown key or a value of another type.
    """
    try:
        values: Any = yaml.safe_load(Path(path).read_text()) or {}
    except OSError as error:
        raise InputError(f"site file {path} cannot be read ({error.strerror}): give one by --site") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"site file {path} is no YAML: {error}") from None
    known = {entry.name: entry for entry in fields(Site) if entry.name != "source"}
    if not isinstance(values, dict) or not set(values) <= set(known):
        unknown = sorted(map(str, set(values) - set(known))) if isinstance(values, dict) else [type(values).__name__]
        raise InputError(f"site file {path}: unknown {', '.join(unknown)}; it may have {', '.join(known)}")
    read: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(known[name].default, tuple):
            if not isinstance(value, list) or not all(isinstance(line, str) for line in value):
                raise InputError(f"site file {path}: {name} must be a list of texts")
            read[name] = tuple(value)
        elif value is None or isinstance(value, (str, int)):
            read[name] = "" if value is None else str(value)
        else:
            raise InputError(f"site file {path}: {name} must be one text")
    return Site(**read, source=str(path))


def seconds_of(time: str) -> int:
    """Seconds of a limit such as 2-12:00:00 or 1:30:00; two numbers are minutes and seconds, as of sbatch.

    Raises:
        InputError: it is no such time.
    """
    found = _TIME.fullmatch(time)
    if not found:
        raise InputError(f"--time {time}: give [days-]hours:minutes:seconds")
    days, first, second, third = found.groups()
    if third is not None:
        parts = (int(first), int(second), int(third))
    else:  # with days, sbatch reads two numbers as hours and minutes
        parts = (int(first), int(second), 0) if days else (0, int(first), int(second))
    hours, minutes, seconds = parts
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise InputError(f"--{name.replace('_', '-')} {value} must be at least {least}")
