"""`gve bench building`: prompt, patches and positions of a sample against transformers' processor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from gve.bench.clips import CAPTION, clips_of
from gve.bench.measure import Aim, Contest, Options, Trial, one_thread
from gve.bench.stock import HERE, StockInputs, clip_pixels, mean_difference
from gve.inputs import InputBuilder, InputPolicy
from gve.items import EmbedBatch, Item
from gve.toy.base import EMBEDDED
from gve.video import Sampling, decode

POLICY = InputPolicy(sampling=Sampling.uniform(8), positions="transformers5")
TEXTS = 64


def trials(options: Options) -> Iterator[Trial]:
    """Texts, then clips that are decoded already."""
    stock = StockInputs(EMBEDDED, POLICY)
    builder = InputBuilder.from_base(str(EMBEDDED), POLICY)
    clips, words = clips_of(options)
    frames = [decode(path, POLICY.sampling) for path in clips]
    setting = {"clips": words, "frames": 8, "max_frame_tokens": POLICY.max_frame_tokens, "threads": 1}
    positions = stock.positions_of(EMBEDDED)
    texts = [Item.of(f"{CAPTION} {number}", instruction="Find the clip.") for number in range(TEXTS)]
    made = [Item.of(video=clip) for clip in frames]
    with one_thread():
        for what, items, unit in (("texts", texts, "texts"), ("decoded clips", made, "clips")):
            ways: dict[str, Callable[[], Any]] = {"gve": partial(builder, items)}
            if what != "texts":
                ways[HERE] = partial(_normalised_here, builder, items)
            ways["stock"] = partial(_stock, stock, positions, items)
            yield Contest(
                f"{what} to model inputs with positions",
                ways,
                [Aim("gve", "stock", "faster", 2.0), *(Aim(name, "stock", "faster") for name in ways if name == HERE)],
                count=len(items),
                unit=unit,
                setting=setting,
                uncompared=frozenset({HERE}),
                tolerance=1.0,
                difference=_difference,
                clock="cpu",
            )


def _normalised_here(builder: InputBuilder, items: list[Item]) -> torch.Tensor | None:
    """The clips of a batch as the tower reads them."""
    return clip_pixels(builder(items))


def _stock(stock: StockInputs, positions: Any, items: list[Item]) -> tuple[Any, torch.Tensor]:
    """Inputs by the processor, and positions as the model's forward computes them."""
    made = stock.of_frames(items)
    return made, positions(made)


def _difference(ours: EmbedBatch, theirs: tuple[Any, torch.Tensor]) -> float:
    inputs, positions = theirs
    mask = ours.attention_mask.bool()
    if not torch.equal(ours.position_ids[:, mask], positions[:, mask]):
        return float("inf")
    return mean_difference(ours, inputs)
