"""What a sweep file asks for: cells x seeds, each a run with a name of its own.

A sweep file (experiments/<NNNN-slug>/sweep.yaml) names configurations at real size and at toy size, and cells that
differ from them by overlays and values::

    seeds: [42]
    configs: [../../configs/gve_3b.yaml]
    toy: {seeds: [0, 1, 2], configs: [../../configs/quickstart.yaml, ../toy.yaml], world: {scale: 0.5}}
    baseline: uniform
    cells:
      uniform: {set: {data: {curriculum: {schedule: uniform}}}}
      pyramid: {overlays: [pyramid.yaml], toy: {overlays: [pyramid_toy.yaml]}}

Configurations are merged by the command line itself, in the order configs, overlays, values: `gve sweep run --dry-run`
prints commands that anybody can type. The seed is that of the run, so cells of one seed see the same draws: all
comparisons are paired.

A run's id is a pure function of the sweep's name, the cell, the seed and the hash of all that was configured: contents
of the files (not their comments or places), values, steps and the toy world. What a machine decides (`PLACES`) stands
in no hash. A changed configuration is another run; the old one's folder stays.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from gve.items import InputError

STEPS = ("fit", "validate", "uvrb")
"""What a run may do, in this order: train, score by the callback of `gve validate`, score by `gve uvrb run`."""

PLACES = (
    "trainer.accelerator",
    "trainer.num_nodes",
    "trainer.devices",
    "trainer.strategy",
    "trainer.precision",
    "trainer.enable_progress_bar",
    "model.base",
    "model.attention",
    "model.chunk_tokens",
    "model.gradient_checkpointing",
    "model.feature_cache_mb",
    "data.root",
    "data.num_workers",
    "uvrb.root",
    "uvrb.num_workers",
    "uvrb.batch_tokens",
    "uvrb.memory_mb",
    "probe.num_workers",
    "probe.batch_tokens",
    "mining.num_workers",
)
"""Values that belong to a machine: where data lie and on what a run trains. They may be set from the command line."""

_RUN = re.compile(r"\{run:([^{}]+)\}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


@dataclass(frozen=True)
class World:
    """The toy world of a cell (`gve toy make`); equal worlds are made once for all sweeps.

    Args:
        scale: share of the full training mixture, 1.0 for about 10,000 pairs.
        test_scale: share of the mini UVRB's sizes.
        seed: of scenes and words.
        dialect: of the test sets, A (trained) or B (transfer).
    """

    scale: float = 1.0
    test_scale: float = 1.0
    seed: int = 0
    dialect: str = "A"

    @property
    def name(self) -> str:
        """Its folder."""
        return f"x{self.scale:g}-t{self.test_scale:g}-s{self.seed}-{self.dialect}"

    def words(self, folder: Path) -> list[str]:
        """The command after `gve` that makes it."""
        scales = ["--scale", f"{self.scale:g}", "--test-scale", f"{self.test_scale:g}"]
        return ["toy", "make", str(folder), *scales, "--seed", str(self.seed), "--dialect", self.dialect, "--quiet"]


@dataclass(frozen=True)
class Benchmark:
    """The step `uvrb`: scores of `gve uvrb run`, one result for each setting.

    Args:
        model: a checkpoint, folder or hub name; the run's own checkpoint when empty.
        frames: frames of a clip, one setting each.
        tokens: most vision tokens of a frame, one setting each.
        grid: every number of frames with every number of tokens.
        max_length: tokens of one input.
    """

    model: str = ""
    frames: tuple[int, ...] = (8,)
    tokens: tuple[int, ...] = (200,)
    grid: bool = False
    max_length: int = 8192

    def words(self) -> list[str]:
        """Options of `gve uvrb run`."""
        counts = {"--frames": self.frames, "--tokens": self.tokens}
        words = [word for name, values in counts.items() for word in (name, *map(str, values))]
        return [*words, *(["--grid"] if self.grid else []), "--max-length", str(self.max_length)]


@dataclass(frozen=True)
class Cell:
    """One condition of a sweep, at one size.

    Args:
        name: unique in the sweep.
        configs: configuration files, base first.
        values: nested mapping laid over them.
        steps: what each of its runs does.
        checkpoint: which one is scored: "last" (after a fixed number of steps, default) or "best" (on the dev split).
        world: toy world it trains on; None at real size.
        benchmark: of the step `uvrb`.
        x: the number that a curve is drawn over, such as training pairs.
        note: one line for readers.
    """

    name: str
    configs: tuple[Path, ...]
    values: Mapping[str, Any] = field(default_factory=dict)
    steps: tuple[str, ...] = ("fit", "validate")
    checkpoint: str = "last"
    world: World | None = None
    benchmark: Benchmark = field(default_factory=Benchmark)
    x: float | None = None
    note: str = ""

    @property
    def needs(self) -> tuple[str, ...]:
        """Cells whose run of the same seed comes first: those that `{run:CELL}` names."""
        text = json.dumps([self.values, self.benchmark.model])
        return tuple(dict.fromkeys(_RUN.findall(text)))


@dataclass(frozen=True)
class Run:
    """One cell under one seed.

    Args:
        sweep: its name.
        cell: the condition.
        seed: of all draws.
        config: hex SHA-256 of what was configured, the first 16 letters.
        needs: ids of runs that come first, by the name of their cell.
    """

    sweep: str
    cell: Cell
    seed: int
    config: str
    needs: Mapping[str, str] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """Names the run and its folder: cell, seed, and eight letters of the hash of sweep, cell, seed and config."""
        key = json.dumps([self.sweep, self.cell.name, self.seed, self.config])
        return f"{self.cell.name}-s{self.seed}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Sweep:
    """A sweep file at one size.

    Args:
        name: of the file's folder, with "-toy" at toy size.
        path: the file.
        seeds: of every cell.
        cells: the conditions, in the order of the file.
        baseline: the cell that the others are compared with; "" for none.
    """

    name: str
    path: Path
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...]
    baseline: str = ""

    def runs(self, only: Sequence[str] = ()) -> list[Run]:
        """All runs, seed by seed, those that others need before them.

        Args:
            only: cells to keep, with the cells that they need; all when empty.

        Raises:
            InputError: an unknown cell is named, or cells need one another.
        """
        known = {cell.name: cell for cell in self.cells}
        if unknown := [name for name in only if name not in known]:
            raise InputError(f"{self.path} has no cell {', '.join(unknown)}; its cells: {', '.join(known)}")
        order: list[str] = []

        def place(name: str, above: tuple[str, ...]) -> None:
            if name in above:
                raise InputError(f"{self.path}: cells need one another: {' -> '.join([*above, name])}")
            if name not in known:
                raise InputError(f"{self.path}: cell {above[-1]} needs cell {name}, which is not there at this size")
            for other in known[name].needs:
                place(other, (*above, name))
            if name not in order:
                order.append(name)

        for cell in self.cells:
            if not only or cell.name in only:
                place(cell.name, ())
        made: dict[tuple[str, int], Run] = {}
        for seed in self.seeds:
            for name in order:
                cell = known[name]
                needs = {other: made[other, seed].id for other in cell.needs}
                made[name, seed] = Run(self.name, cell, seed, config_hash(cell, needs), needs)
        return list(made.values())


def share(runs: Sequence[Run], index: int, count: int) -> list[Run]:
    """The runs of one of several commands. Runs that need one another stay together: no command waits for another."""
    owner: dict[str, str] = {}
    for run in runs:
        first = [owner[other] for other in run.needs.values() if other in owner]
        owner[run.id] = first[0] if first else run.id
        for name in first[1:]:  # two groups that one run joins become one
            owner = {other: first[0] if group == name else group for other, group in owner.items()}
    groups = list(dict.fromkeys(owner[run.id] for run in runs))
    mine = set(groups[index::count])
    return [run for run in runs if owner[run.id] in mine]


def config_hash(cell: Cell, needs: Mapping[str, str]) -> str:
    """Hex SHA-256, 16 letters, over all that a cell configures; `{run:CELL}` stands for that run's id."""
    content = {
        "configs": [_content(path) for path in cell.configs],
        "values": filled(cell.values, needs),
        "steps": cell.steps,
        "checkpoint": cell.checkpoint if "fit" in cell.steps else "",
        "world": cell.world.name if cell.world else "",
        "benchmark": [filled(cell.benchmark.model, needs), cell.benchmark.words()] if "uvrb" in cell.steps else [],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def filled(value: Any, runs: Mapping[str, str]) -> Any:
    """The value with `{run:CELL}` replaced in all of its texts."""
    if isinstance(value, str):
        return _RUN.sub(lambda found: runs[found[1]], value)
    if isinstance(value, Mapping):
        return {key: filled(one, runs) for key, one in value.items()}
    return [filled(one, runs) for one in value] if isinstance(value, (list, tuple)) else value


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings laid over one another, the last on top; everything but a mapping is replaced."""
    out: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
            out[key] = merged(out[key], value) if both else value
    return out


def machine_values(changes: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE words of the command line as a nested mapping.

    Raises:
        InputError: no such key, or one that is part of a run's id.
    """
    out: dict[str, Any] = {}
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals or key not in PLACES:
            raise InputError(
                f"--set {change}: give KEY=VALUE with a key that belongs to the machine ({', '.join(PLACES)}); "
                "anything else is another cell of the sweep file"
            )
        value: Any = yaml.safe_load(text)
        for part in reversed(key.split(".")):
            value = {part: value}
        out = merged(out, value)
    return out


def read_sweep(path: str | Path, *, toy: bool = False) -> Sweep:
    """A sweep file at real or at toy size.

    Args:
        path: the file, or its folder.
        toy: toy size.

    Raises:
        InputError: it cannot be read, has unknown keys, or has nothing at this size.
    """
    file = Path(path) / "sweep.yaml" if Path(path).is_dir() else Path(path)
    data = _mapping(file)
    _known(data, {"seeds", "configs", "set", "steps", "checkpoint", "baseline", "benchmark", "toy", "cells"}, f"{file}")
    head = {name: value for name, value in data.items() if name not in ("toy", "cells")}
    if toy:
        if not isinstance(data.get("toy"), Mapping):
            raise InputError(f"{file} has no part `toy`: it runs at real size alone")
        _known(data["toy"], {"seeds", "configs", "set", "steps", "checkpoint", "benchmark", "world"}, f"{file}, toy")
        head |= data["toy"]
    elif "configs" not in data:
        raise InputError(f"{file} has no configs at real size; give --toy")
    cells = []
    for name, given in (data.get("cells") or {}).items():
        where = f"{file}, cell {name}"
        _known(given or {}, {"overlays", "set", "steps", "benchmark", "x", "world", "note", "toy", "real"}, where)
        own: dict[str, Any] = dict(given or {})
        at_toy, at_real = own.pop("toy", {}), own.pop("real", True)
        if (toy and at_toy is False) or (not toy and at_real is False):
            continue
        if toy and at_toy:
            _known(at_toy, {"overlays", "set", "steps", "benchmark", "x", "world", "note"}, f"{where}, toy")
            own |= at_toy
        cells.append(_cell(str(name), own, head, file, where, toy=toy))
    if not cells:
        raise InputError(f"{file} has no cells at this size")
    seeds = tuple(head.get("seeds", (42,)))
    if not seeds or not all(isinstance(seed, int) for seed in seeds) or len(set(seeds)) < len(seeds):
        raise InputError(f"{file}: seeds {list(seeds)} must be different whole numbers")
    baseline = str(head.get("baseline", ""))
    if baseline and baseline not in {cell.name for cell in cells}:
        raise InputError(f"{file}: baseline {baseline} is none of its cells")
    folder = file.resolve().parent.name if file.name == "sweep.yaml" else file.stem
    return Sweep(folder + ("-toy" if toy else ""), file, seeds, tuple(cells), baseline)


def _cell(name: str, own: Mapping[str, Any], head: Mapping[str, Any], file: Path, where: str, *, toy: bool) -> Cell:
    if not _NAME.fullmatch(name):
        raise InputError(f"{where}: a name is letters, digits, '.', '_', '+' and '-', as it names a folder")
    steps = tuple(own.get("steps", head.get("steps", ("fit", "validate"))))
    if not steps or list(steps) != [step for step in STEPS if step in steps]:
        raise InputError(f"{where}: steps {list(steps)} must be some of {', '.join(STEPS)}, in this order")
    checkpoint = str(head.get("checkpoint", "last"))
    if checkpoint not in ("last", "best"):
        raise InputError(f"{file}: checkpoint {checkpoint!r} must be last or best")
    names = (*head["configs"], *own.get("overlays", ()))
    configs = tuple(Path(os.path.normpath(file.parent / one)) for one in names)
    for path in configs:
        if not path.is_file():
            raise InputError(f"{where}: no configuration at {path}")
    world = merged(head.get("world") or {}, own.get("world") or {}) if toy else {}
    benchmark = merged(head.get("benchmark") or {}, own.get("benchmark") or {})
    lists = {key: tuple(value) if isinstance(value, list) else value for key, value in benchmark.items()}
    return Cell(
        name=name,
        configs=configs,
        values=merged(head.get("set") or {}, own.get("set") or {}),
        steps=steps,
        checkpoint=checkpoint,
        world=_record(World, world, where) if toy else None,
        benchmark=_record(Benchmark, lists, where),
        x=own.get("x"),
        note=str(own.get("note", "")),
    )


def _record(kind: type, values: Mapping[str, Any], where: str) -> Any:
    _known(values, {one.name for one in fields(kind)}, f"{where}, {kind.__name__.lower()}")
    return kind(**values)


def _known(data: Any, keys: set[str], where: str) -> None:
    if not isinstance(data, Mapping):
        raise InputError(f"{where} is no mapping of keys to values")
    if unknown := sorted(map(str, set(data) - keys)):
        raise InputError(f"{where}: unknown key {', '.join(unknown)}; use {', '.join(sorted(keys))}")


def _mapping(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML: {error}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path} holds no mapping of keys to values")
    return data


def _content(path: Path) -> Any:
    """A configuration file and the parts that it names (`trainer: trainer/ddp.yaml`), as plain values."""
    return {key: _part(value, path.parent) for key, value in _mapping(path).items()}


def _part(value: Any, folder: Path) -> Any:
    names_a_file = isinstance(value, str) and value.endswith((".yaml", ".yml"))
    return _content(folder / value) if names_a_file else value


def steps_left(run: Run, done: Mapping[str, bool]) -> Iterator[str]:
    """Steps of a run from the first that is not done: what follows a step rests on it."""
    for place, step in enumerate(run.cell.steps):
        if not done.get(step):
            yield from run.cell.steps[place:]
            return
