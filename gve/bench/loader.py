"""`gve bench loader`: what a core reads in a second, from raw files and from pre-sampled shards."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F

from gve.bench.clips import CAPTION, clips_of, shards_of
from gve.bench.fit import ShortFit, meters_of
from gve.bench.measure import Aim, Contest, Gauge, Options, Trial, one_thread
from gve.bench.stock import HERE, StockInputs, clip_pixels, mean_difference
from gve.data.loader import Quarantine, StepBuilder
from gve.data.plan import Rows
from gve.data.sources import Source
from gve.inputs import InputBuilder, InputPolicy, smart_size
from gve.items import Item, TrainBatch
from gve.toy.base import EMBEDDED
from gve.video import Sampling

POLICY = InputPolicy(sampling=Sampling.uniform(8))
FRAME_PX = POLICY.max_frame_tokens * 28**2


def trials(options: Options) -> Iterator[Trial]:
    """Reading of text-to-video pairs, then the stall of a fit."""
    stock = StockInputs(EMBEDDED, POLICY)
    clips, words = clips_of(options)
    raw = shards_of(clips, options.folder)
    frames = shards_of(clips, options.folder, POLICY.sampling, FRAME_PX)
    setting = {"clips": words, "frames": 8, "max_frame_tokens": POLICY.max_frame_tokens, "threads": 1}
    with one_thread():
        ways: dict[str, Callable[[], Any]] = {
            "gve": reader(raw, options.folder),
            HERE: partial(normalised_here, reader(raw, options.folder)),
            "stock": partial(read_stock, stock, clips),
        }
        yield Contest(
            "raw files to a batch of model inputs",
            ways,
            [Aim("gve", "stock", "faster", 1.3), Aim(HERE, "stock", "faster")],
            count=len(clips),
            unit="clips",
            setting=setting,
            uncompared=frozenset({HERE}),
            tolerance=1.0,
            difference=_difference,
            clock="cpu",
        )
        ways = {
            "gve": reader(frames, options.folder),
            HERE: partial(normalised_here, reader(frames, options.folder)),
            "stock": ways["stock"],
            "bare": partial(bare_jpegs, stored_jpegs(frames)),
        }
        yield Contest(
            "pre-sampled shards to a batch of model inputs",
            ways,
            [Aim("gve", "stock", "faster", 15), Aim("gve", "bare", "cost", 1.5), Aim(HERE, "stock", "faster")],
            count=len(clips),
            unit="clips",
            setting={**setting, "stored_frame_px": FRAME_PX, "jpeg_quality": 95, "bare": "JPEG decoding and resize"},
            uncompared=frozenset({HERE, "bare"}),
            # Stored frames were resized once and compressed: their mean difference is told, in levels of 255.
            tolerance=4.0,
            difference=_difference,
            clock="cpu",
        )
    yield Gauge(
        "share of a fit's time that waits for data: tiny model, pre-sampled shards, 2 workers",
        partial(stall_share, options.folder / "frames", options.folder, workers=2),
        "share",
        at_most=0.01,
        setting={"workers": 2, "batch": 4, "steps": 24},
        rounds=min(options.rounds, 3),
    )


def reader(source: Source, folder: Path) -> Callable[[], TrainBatch]:
    """Reads all rows of a source as one step, by the loader's own step builder."""
    builder = InputBuilder.from_base(str(EMBEDDED), POLICY)
    build = StepBuilder([source], builder, [0], 0, Quarantine(folder), torch.full((1, 3), -1))
    return partial(build, Rows(0, 0, 0, tuple((0, row, row) for row in range(len(source))), 0))


def normalised_here(read: Callable[[], TrainBatch]) -> torch.Tensor | None:
    """The clips of a batch as the tower reads them."""
    return clip_pixels(read().target)


def read_stock(stock: StockInputs, clips: list[Path]) -> tuple[Any, Any]:
    """The same pairs, queries and targets."""
    return stock([Item.of(CAPTION) for _ in clips]), stock([Item.of(video=path) for path in clips])


def bare_jpegs(clips: list[list[bytes]]) -> list[torch.Tensor]:
    """Stored frames decoded and resized, and nothing else: what no loader can be faster than."""
    made = []
    for jpegs in clips:
        pixels = torch.from_numpy(np.stack([np.array(PIL.Image.open(io.BytesIO(jpeg))) for jpeg in jpegs]))
        sides = smart_size(
            pixels.shape[1], pixels.shape[2], 28, POLICY.min_frame_tokens * 784, POLICY.max_frame_tokens * 784
        )
        made.append(F.interpolate(pixels.permute(0, 3, 1, 2), sides, mode="bicubic", antialias=True))
    return made


def stored_jpegs(source: Source) -> list[list[bytes]]:
    """The stored frames of every row."""
    rows = [source.members(row) for row in range(len(source))]
    return [[data for name, data in sorted(row.items()) if name.endswith(".jpg")] for row in rows]


def stall_share(root: Path, folder: Path, workers: int = 2, **settings: int) -> float:
    """Share of the time of a short fit that waits for data."""
    fit = ShortFit(str(root), tempfile.mkdtemp(dir=folder), workers=workers, **settings)
    return meters_of(fit)["data_wait_share"]


def _difference(ours: TrainBatch, theirs: tuple[Any, Any]) -> float:
    """Both sides of a step, ours against the stock way's."""
    return max(mean_difference(ours.query, theirs[0]), mean_difference(ours.target, theirs[1]))
