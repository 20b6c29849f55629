"""The whole toy world in one folder: a tiny base, training shards of all thirteen tasks, and the mini UVRB.

Layout::

    base/               a hub folder of the real model class (gve.toy.base)
    shards/             manifest.json and level{1,2,3}/<task>/ (gve.data.shards)
    uvrb/<NAME>/        jsonl/ in the released layout, set.json with chance and ceilings
    uvrb/media/         every clip and picture of the test sets, once
    world.json          what was asked for; an equal request reuses the folder
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gve.items import InputError
from gve.toy.render import Shot, Still, render_all
from gve.toy.training import Mixture, Source, shown
from gve.toy.uvrb import Builder, MiniSet, write_set

VERSION = 2  # of the generator: raise it when the same request would give other files


@dataclass(frozen=True)
class Request:
    """What a world is made from: equal requests give equal files.

    Args:
        seed: of scenes, words and weights.
        scale: share of the full training mixture, 1.0 for about 10,000 pairs.
        test_scale: share of the mini UVRB's sizes; below 1 its sets are for tests of code only.
        dialect: of the test sets. "A" is the trained one (held-out scenes), "B" is the transfer.
        base: "trained", the one that the package carries, or "random", the same architecture with random weights.
    """

    seed: int = 0
    scale: float = 1.0
    test_scale: float = 1.0
    dialect: str = "A"
    base: str = "trained"

    def __post_init__(self) -> None:
        if not 0 < self.scale <= 10 or not 0 < self.test_scale <= 1:
            raise InputError(f"scale {self.scale}, test scale {self.test_scale}: use above 0 to 10, and above 0 to 1")
        if self.dialect not in ("A", "B"):
            raise InputError(f"dialect {self.dialect!r}: use A (trained) or B (transfer)")
        if self.base not in ("trained", "random"):
            raise InputError(f"base {self.base!r}: use trained or random")


def make_world(out: str | Path, request: Request | None = None, *, jobs: int = 2, progress: bool = True) -> Path:
    """Make the toy world, or reuse the one that was made from an equal request.

    Everything is written to `<out>.tmp` and renamed when it is whole; files of an interrupted run are rendered anew
    (the whole world takes about a minute and a half on two cores).

    Args:
        out: the folder of the world.
        jobs: processes that render.
        progress: whether to show a bar on the terminal.

    Returns:
        The folder.

    Raises:
        InputError: the folder holds a world of another request, or something else, or cannot be written.
    """
    out, request = Path(out), request or Request()
    asked = {"version": VERSION, **asdict(request)}
    if _is_made(out, asked):
        return out
    partial = out.with_name(out.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{out} cannot be written ({error.strerror}); choose another folder") from None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not progress, transient=True) as bar:
        sets = Builder(request.seed, request.dialect, request.test_scale).build()
        tested = {shown(clip) for mini in sets for clip in mini.corpus}
        sources = list(Mixture(request.seed, request.scale, tested).sources())
        _write_base(partial / "base", request)
        counts = {"uvrb": _write_uvrb(partial / "uvrb", sets, jobs, bar)}
        counts["shards"] = _write_shards(partial / "shards", sources, jobs, bar)
    (partial / "world.json").write_text(json.dumps({**asked, **counts}, indent=2) + "\n")
    os.replace(partial, out)
    return out


def _is_made(out: Path, asked: dict[str, Any]) -> bool:
    """Whether `out` holds the world that is asked for; refuses to touch anything else."""
    if not out.exists():
        return False
    try:
        found = json.loads((out / "world.json").read_text())
    except (OSError, json.JSONDecodeError):
        raise InputError(f"{out} exists and is no toy world; choose another folder") from None
    differing = [
        f"{key} {found.get(key)!r} instead of {value!r}" for key, value in asked.items() if found.get(key) != value
    ]
    if differing:
        raise InputError(f"{out} holds another toy world ({', '.join(differing)}); remove it or choose another folder")
    return True


def _write_base(folder: Path, request: Request) -> None:
    from gve.toy.base import copy_base, random_twin  # imports transformers, 4 s: not for a world that is there already

    if request.base == "trained":
        copy_base(folder)
    else:
        random_twin(folder, request.seed)


def _write_uvrb(root: Path, sets: list[MiniSet], jobs: int, bar: Progress) -> dict[str, Any]:
    (root / "media").mkdir(parents=True)
    specs = list(dict.fromkeys(spec for mini in sets for spec in mini.shots()))
    task = bar.add_task("test clips", total=len(specs))
    for spec, data in render_all(specs, jobs, lambda done: bar.advance(task, done)):
        (root / "media" / spec.name).write_bytes(data)
    facts = {mini.name: write_set(mini, root) for mini in sets}
    return {name: fact["notes"] for name, fact in facts.items()}


def _write_shards(root: Path, sources: list[Source], jobs: int, bar: Progress) -> dict[str, Any]:
    from gve.data.shards import ShardWriter

    specs = list(dict.fromkeys(_media(sources)))
    task = bar.add_task("training clips", total=len(specs))
    files = {spec.name: data for spec, data in render_all(specs, jobs, lambda done: bar.advance(task, done))}
    counts = {}
    for source in sources:
        with ShardWriter(root, task=source.task, source=source.name, instruction=source.instruction) as writer:
            for sample in source.samples:
                writer.write(sample.pair(files))
        counts[source.name] = {"task": source.task, "pairs": len(source.samples)}
    return counts


def _media(sources: Iterable[Source]) -> Iterator[Shot | Still]:
    for source in sources:
        for sample in source.samples:
            yield from (side.media for side in sample.sides if side.media)
