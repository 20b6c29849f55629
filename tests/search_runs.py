"""Indexing in processes of its own, made to be killed, with an encoder that is quick and looks at every frame."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from gve.encode.decoding import Decoding
from gve.encode.encoder import Encoded, Transform
from gve.items import Frames, Item
from gve.search.files import walk
from gve.search.index import Index, IndexRecord
from gve.search.indexing import Update, compare, update_index
from gve.search.windows import Windows
from gve.video import Sampling

DIM = 36
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["search_runs"])


def features(item: Item) -> np.ndarray:
    """[DIM] mean colours of a grid of 3 x 4 fields over all frames; of a text, numbers drawn from its hash."""
    if not item.media:
        seed = int.from_bytes(hashlib.sha256(item.text.encode()).digest()[:8], "big")
        vector = np.random.default_rng(seed).normal(size=DIM)
    else:
        source = item.media[0].source
        pixels = source.pixels if isinstance(source, Frames) else source[None]
        height, width = pixels.shape[1] // 3 * 3, pixels.shape[2] // 4 * 4
        fields = pixels[:, :height, :width].reshape(len(pixels), 3, height // 3, 4, width // 4, 3)
        vector = fields.mean((0, 2, 4)).ravel() - 127.5
    return (vector / np.linalg.norm(vector)).astype(np.float32)


class Colours:
    """An encoder without weights."""

    dim = DIM
    fingerprint = hashlib.sha256(b"colours").hexdigest()

    def __init__(self) -> None:
        self.encoded: list[str] = []  # names of what it was given

    def encode(self, items: Sequence[Item], *, transform: Transform | None = None, progress: str = "") -> Encoded:
        self.encoded += [", ".join(medium.name for medium in item.media) or item.text for item in items]
        vectors, failures = np.full((len(items), DIM), np.nan, np.float32), {}
        for ready, failed in Decoding(Sampling.uniform(4), features)(items, transform):
            for row, vector in ready.items():
                vectors[row] = vector
            failures |= failed
        return Encoded(vectors, failures)


def record(windows: Windows | None = None) -> IndexRecord:
    return IndexRecord("colours", Colours.fingerprint, DIM, windows=windows or Windows(2.0, 1.0))


def bring_up(uri: Path, folder: Path, encoder: Colours | None = None, **options: Any) -> tuple[Index, Update]:
    """Indexes a folder as `gve index` does."""
    index = Index.open(uri) if Index.exists(uri) else Index.create(uri, record())
    return index, update_index(index, compare(index, walk([folder])), encoder or Colours(), **options)


# Where a run is killed: (what is called, which call of it, before or after it, or so many ms after it began).
POINTS: list[tuple[str, int, str | float]] = [
    ("create", 0, "after"),
    ("encode", 0, "before"),
    ("add", 0, 4.0),
    ("encode", 2, "after"),
    ("replace", 3, "before"),
    ("add", 0, "before"),
    ("add", 1, 1.0),
    ("add", 1, "after"),
    ("reject", 1, "after"),
    ("compact", 0, "before"),
    ("compact", 0, 3.0),
]


def killed_at(uri: Path, folder: Path, point: tuple[str, int, str | float]) -> int:
    """Exit code of a run that is killed at a point; -9 when it was."""
    process = _FORKS.Process(target=_run, args=(uri, folder, point))
    process.start()
    process.join(120)
    alive = process.is_alive()
    if alive:
        process.kill()
        process.join()
    assert not alive, "the run hung"
    return process.exitcode or 0


def _run(uri: Path, folder: Path, point: tuple[str, int, str | float]) -> None:
    place, number, when = point
    calls = 0
    owners = {"encode": (Colours, "encode"), "replace": (os, "replace")}
    owner, name = owners.get(place, (Index, place))
    plain = getattr(owner, name)

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        due, calls = calls == number, calls + 1
        if due and when == "before":
            die()
        if due and isinstance(when, float):
            threading.Timer(when / 1000, die).start()
        result = plain(*args, **kwargs)
        if due:
            if isinstance(when, float):
                threading.Event().wait(1)
            die()
        return result

    with mock.patch.object(owner, name, stand_in):
        bring_up(uri, folder, batch_windows=6)
