"""The symmetric InfoNCE of a large batch in tiles, beside the full matrix: time, and memory beyond its inputs."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from gve.bench.measure import Aim, Contest, Gauge, Options, Trial
from gve.items import InputError
from gve.model.infonce import Contrast, info_nce

DIM = 1024
TILE = 512
PAIRS = {"tiny": (4096, 8192), "mid": (8192, 32768), "3b": (32768, 32768), "7b": (32768, 32768)}
"""Pairs of the race and of the memory, by --size. 32,768 take minutes on a CPU core, and their matrix 4 GiB."""
BYTES_PER_PAIR = 1.2e9 / 32768
"""The bound: 1.2 GB for 32,768 pairs. Gradients and tiles both grow with the pairs, so smaller batches scale it."""
TEMPERATURE = 0.03


def rows(pairs: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and targets [pairs, DIM], unit rows that need a gradient; the cosine of a pair is about 0.1."""
    generator = torch.Generator(device).manual_seed(0)
    query = torch.randn(pairs, DIM, generator=generator, device=device)
    target = torch.randn(pairs, DIM, generator=generator, device=device).add_(query, alpha=0.1)
    return tuple(each.div_(each.norm(dim=1, keepdim=True)).requires_grad_() for each in (query, target))  # type: ignore[return-value]


def tiled(query: torch.Tensor, target: torch.Tensor, tile: int = TILE) -> torch.Tensor:
    """Ours."""
    return info_nce(query, target, Contrast(TEMPERATURE, tile=tile), gather=False).loss


def full(query: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """As it is written everywhere: one matrix of cosines, cross entropy over its rows and over its columns."""
    logits = query @ target.T / TEMPERATURE
    labels = torch.arange(len(logits), device=logits.device)
    return (nn.functional.cross_entropy(logits, labels) + nn.functional.cross_entropy(logits.T, labels)) / 2


def trials(options: Options) -> Iterator[Trial]:
    """Time against the full matrix, and memory, at the size's numbers of pairs."""
    pairs, many = PAIRS[options.size]
    given = rows(pairs, options.device)

    def run(loss: torch.Tensor) -> dict[str, torch.Tensor]:
        gradients = torch.autograd.grad(loss, given)
        if options.device != "cpu":
            torch.cuda.synchronize()
        return {"loss": loss.detach(), "query": gradients[0] * pairs, "target": gradients[1] * pairs}

    yield Contest(
        what=f"symmetric InfoNCE of {pairs:,} pairs at {DIM:,} dimensions, forward and backward",
        contestants={"gve": lambda: run(tiled(*given)), "full matrix": lambda: run(full(*given))},
        aims=[Aim("gve", "full matrix", "cost", 1.4)],
        count=pairs,
        unit="pairs",
        setting={"pairs": pairs, "dim": DIM, "tile": TILE, "dtype": "float32", "temperature": TEMPERATURE},
        tolerance=2e-3,  # of gradients of a pair, whose values reach 5
        clock="cpu" if options.device == "cpu" else "wall",
    )
    yield Gauge(
        what=f"memory of the same at {many:,} pairs, beyond its inputs",
        measure=lambda: beyond_inputs(many, options.device) / 2**20,
        unit="MiB",
        at_most=round(many * BYTES_PER_PAIR / 2**20),
        setting={"pairs": many, "dim": DIM, "tile": TILE, "gradients": "included"},
        rounds=1,
    )


def beyond_inputs(pairs: int, device: str = "cpu", *, tile: int = TILE) -> float:
    """Bytes that loss and backward need at their peak, gradients included, inputs not.

    On a CPU by the largest resident memory of a child process, which is this module run as a program.

    Raises:
        InputError: the child failed, most likely for want of memory.
    """
    if device != "cpu":
        given = rows(pairs, device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        tiled(*given, tile).backward()
        return torch.cuda.max_memory_allocated(device) - held
    words = [sys.executable, "-m", "gve.bench.loss", str(pairs), str(tile)]
    child = subprocess.run(words, capture_output=True, text=True, check=False)
    if child.returncode:
        raise InputError(f"the loss of {pairs:,} pairs failed in a child process: {child.stderr.strip()[-200:]}")
    return json.loads(child.stdout)


def _grown(pairs: int, tile: int) -> int:
    """In a child: resident bytes at the peak of loss and backward over those before."""
    tiled(*rows(64), tile=32).backward()  # libraries and their buffers
    given = rows(pairs)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    tiled(*given, tile).backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - pages * resource.getpagesize()


if __name__ == "__main__":
    print(_grown(int(sys.argv[1]), int(sys.argv[2])))
