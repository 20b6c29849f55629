"""What a GPU gets out of the real shapes with random weights: speed, memory, utilisation, and the largest batch."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
import transformers

from gve.bench.measure import Gauge, Options, Trial
from gve.bench.step import BASES, Load, embedder, train_batch
from gve.items import EmbedBatch, InputError
from gve.model.backbone import Lora
from gve.model.clock import CLOCK
from gve.plan_report.costs import Architecture, Pictures, Sequences, Training, decoder_flops, step_flops, total
from gve.plan_report.costs import tower_flops as flops_of_tower

# Clips of 8 frames: 800 tokens at the released budget of 200 a frame, less for the small models.
LOADS = {
    "tiny": Load(4, (20, 20), (8, 8), (6, 6), 256),
    "mid": Load(8, (40, 40), (8, 8), (8, 8), 2048),
    "3b": Load(16, (100, 100), (8, 8), (20, 40), 16384),
    "7b": Load(8, (100, 100), (8, 8), (20, 40), 16384),
}
MOST_PAIRS = {"tiny": 8, "mid": 64, "3b": 4096, "7b": 4096}
"""Where the search for the largest batch ends if memory does not."""
PEAKS = {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "L40S": 362e12,
    "B200": 2250e12,
}
"""Dense bfloat16 operations a second by the makers' data sheets, by a word of the device's name."""
MATRIX = 4096  # side of the product that stands in for a peak where no data sheet is known
TRAINING_AIM, ENCODING_AIM = 0.45, 0.55


class Rig:
    """A model, a batch, and the meters around a step.

    Model FLOPs utilisation is F / (s P), with s seconds and P the device's peak (PaLM, arXiv 2204.02311, appendix B).
    F is what the step needs at least, over attended tokens (`gve.plan_report.costs.step_flops`):

        training: tower forward + decoder forward + decoder backward; encoding: tower forward + decoder forward

    where backward is 1 x forward in a frozen linear layer (it passes the gradient on and has none of its own; 2 x in
    full training), 2 x in LoRA and 2.5 x in attention. Hardware FLOPs utilisation also counts what is computed again:
    the layers under checkpointing, and the first pass of GradCache. Padding and an LM head are in neither.

    Args:
        size: of the model.
        device: "cuda" or "cpu".
        load: rows of the step.
        checkpointing: recompute the decoder's layers in backward.
        cached: GradCache, in chunks of the load's size.
    """

    def __init__(self, size: str, device: str, load: Load, *, checkpointing: bool = True, cached: bool = False) -> None:
        base, self.device, self.load = BASES[size], device, load
        self.dtype = "bfloat16" if device == "cuda" else "float32"
        chunk_tokens = load.chunk_tokens if cached else 0
        self.module = embedder(base, self.dtype, chunk_tokens=chunk_tokens, checkpointing=checkpointing, device=device)
        config = transformers.Qwen2_5_VLConfig.from_json_file(base)
        self.batch = train_batch(config, load).to(device)
        trained = [value for value in self.module.parameters() if value.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5)
        self.sizes = Architecture.of(str(base))
        lora = self.module.lora or Lora()
        self.how = Training(
            rank=lora.rank, targets=lora.targets, dropout=False, checkpointing=checkpointing, chunk_tokens=chunk_tokens
        )

    def train_step(self) -> float:
        """Seconds of one step, phases told to the clock."""
        begun = self._now()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            loss = self.module.contrasted(self.batch).loss
        with CLOCK.phase("decoder"):
            loss.backward()
        with CLOCK.phase("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self._now() - begun

    def encode_step(self) -> float:
        """Seconds to embed the clips, tower included; decoding is the loader's bench."""
        self.module.backbone.eval()
        begun = self._now()
        with (
            torch.inference_mode(),
            torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == "bfloat16"),
        ):
            self.module.backbone(self.batch.target)
        seconds = self._now() - begun
        self.module.backbone.train()
        return seconds

    def flops(self, *, encoding: bool = False, hardware: bool = False) -> float:
        """F of a step, or what the hardware computes of it."""
        if encoding:
            rows, pictures = _shapes(self.batch.target)
            forward = sum(total(decoder_flops(self.sizes, one, self.how)) for one in rows)
            return forward + sum(total(flops_of_tower(self.sizes, one)) for one in pictures)
        shapes = [_shapes(side) for side in (self.batch.query, self.batch.target)]
        how = self.how if hardware else replace(self.how, checkpointing=False, chunk_tokens=0)
        rows = [one for shape in shapes for one in shape[0]]
        pictures = [one for shape in shapes for one in shape[1]]
        return total(step_flops(self.sizes, rows, pictures, how))

    def shares(self) -> dict[str, float]:
        """Share of a step's time in each phase, and the share of padding in what the decoder ran on."""
        CLOCK.start(torch.device(self.device))
        seconds = self.train_step()
        phases, padding = CLOCK.read()
        CLOCK.stop()
        return {name: phases.get(name, 0.0) / seconds for name in ("tower", "decoder", "loss")} | {"padding": padding}

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def _shapes(batch: EmbedBatch) -> tuple[list[Sequences], list[Pictures]]:
    """Rows without their padding, and pictures."""
    grids = [] if batch.video_grid is None else batch.video_grid.tolist()
    return [Sequences(1, length) for length in batch.attention_mask.sum(1).tolist()], [
        Pictures(1, (t, h, w)) for t, h, w in grids
    ]


def utilisation(flops: float, seconds: float, peak: float) -> float:
    """F / (s P)."""
    return flops / (seconds * peak)


def peak_flops(device: str) -> tuple[float, str]:
    """Operations a second that the device can do at most, and where the number is from."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
        for word, peak in PEAKS.items():
            if word in name:
                return peak, f"data sheet of {word}, dense bfloat16"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    side = MATRIX if device == "cuda" else MATRIX // 4
    matrix, best = torch.ones(side, side, dtype=dtype, device=device), float("inf")
    for _ in range(5):
        begun = time.perf_counter()
        matrix @ matrix
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begun)
    return 2 * side**3 / best, f"fastest of five products of {side} x {side}: no data sheet is known"


def largest_batch(size: str, device: str, load: Load, *, cached: bool) -> int:
    """Pairs of the largest step that fits, by doubling up to MOST_PAIRS; 0 where not even one pair does."""
    pairs, fits = 1, 0
    while pairs <= MOST_PAIRS[size]:
        try:
            Rig(size, device, replace(load, pairs=pairs), cached=cached).train_step()
        except torch.OutOfMemoryError:
            break
        finally:
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
        fits, pairs = pairs, 2 * pairs
    return fits


def trials(options: Options) -> Iterator[Trial]:
    """All meters at one size.

    Raises:
        InputError: no CUDA device, and no size that a CPU is meant to run.
    """
    size = options.size
    device = "cuda" if size in ("3b", "7b") or options.device.startswith("cuda") else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"--size {size} needs a CUDA device, and torch sees none here; `--size tiny --device cpu` shows the path"
        )
    yield from _of_a_step(size, device)
    for cached in (False, True):
        yield Gauge(
            f"largest batch {'with' if cached else 'without'} GradCache, by doubling up to {MOST_PAIRS[size]}, {size}",
            partial(largest_batch, size, device, LOADS[size], cached=cached),
            "pairs",
            setting={**asdict(LOADS[size]), "cached": cached},
            rounds=1,
        )


def _of_a_step(size: str, device: str) -> Iterator[Trial]:
    """The meters of one rig, which is gone when they end: the largest batch needs its memory."""
    load = LOADS[size]
    rig = Rig(size, device, load)
    peak, source = peak_flops(device)
    setting: dict[str, Any] = {
        **asdict(load),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "dtype": rig.dtype,
        "peak_flops": peak,
        "peak_from": source,
        "lora": "r=16 on six modules",
        "checkpointing": True,
    }
    rig.train_step()  # kernels are chosen and memory is laid out

    def gauge(what: str, measure: Callable[[], float], unit: str, aim: float | None = None) -> Gauge:
        # Aims are those of a data sheet's peak on the real shapes.
        return Gauge(f"{what}, {size}", measure, unit, at_least=aim if size in ("3b", "7b") else None, setting=setting)

    yield gauge("training", lambda: load.pairs / rig.train_step(), "pairs/s")
    yield gauge(
        "training, model FLOPs utilisation",
        lambda: utilisation(rig.flops(), rig.train_step(), peak),
        "share",
        TRAINING_AIM,
    )
    yield gauge(
        "training, hardware FLOPs utilisation (recomputation counted)",
        lambda: utilisation(rig.flops(hardware=True), rig.train_step(), peak),
        "share",
    )
    for part in ("tower", "decoder", "loss", "padding"):
        yield gauge(f"training, share of {part}", lambda part=part: rig.shares()[part], "share")  # type: ignore[misc]
    if device == "cuda":
        yield gauge("training, peak memory", lambda: _peak_memory(rig), "GiB")
    yield gauge("encoding clips", lambda: load.pairs / rig.encode_step(), "items/s")
    yield gauge(
        "encoding, model FLOPs utilisation",
        lambda: utilisation(rig.flops(encoding=True), rig.encode_step(), peak),
        "share",
        ENCODING_AIM,
    )


def _peak_memory(rig: Rig) -> float:
    torch.cuda.reset_peak_memory_stats()
    rig.train_step()
    return torch.cuda.max_memory_allocated() / 2**30
