"""The frame of all benches: the same work done in several ways, in alternating rounds, compared before it is timed."""

from __future__ import annotations

import gc
import math
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

import gve
from gve.encode.ranks import available_cores
from gve.items import InputError

PACKAGES = (
    "torch", "transformers", "lightning", "peft", "numpy", "av", "decord", "pillow", "mteb", "sentence-transformers",
    "qwen-vl-utils",
)  # fmt: skip
SIZES = ("tiny", "mid", "3b", "7b")


class UnequalError(Exception):
    """Two ways of doing the same work gave different outputs: their times do not compare."""


@dataclass(frozen=True)
class Options:
    """What the user chose.

    Args:
        folder: an empty folder of this run, removed after it.
        rounds: how often each contestant is timed.
        size: of the model, one of SIZES.
        device: torch's name of it.
        videos: a folder of the user's own clips; None: clips are rendered.
    """

    folder: Path
    rounds: int = 5
    size: str = "tiny"
    device: str = "cpu"
    videos: Path | None = None


@dataclass(frozen=True)
class Timed:
    """Returned by a contestant that took the time itself, such as one that runs in a child process.

    Args:
        seconds: what counts, instead of the time of the call.
        output: to compare.
    """

    seconds: float
    output: Any = None


@dataclass(frozen=True)
class Aim:
    """What a ratio of two contestants must reach.

    Args:
        ours, other: contestants.
        kind: "faster": ours is at least `value` times as fast as other. "cost": ours takes at most `value` times the
            seconds of other.
        value: the bound; None reports the ratio only.
    """

    ours: str
    other: str
    kind: Literal["faster", "cost"] = "faster"
    value: float | None = None

    def ratio(self, seconds: Mapping[str, float]) -> float:
        """The ratio of one round."""
        return (
            seconds[self.other] / seconds[self.ours]
            if self.kind == "faster"
            else (seconds[self.ours] / seconds[self.other])
        )

    def met(self, ratio: float) -> bool | None:
        """Whether it is reached; None without a bound."""
        if self.value is None:
            return None
        return ratio >= self.value if self.kind == "faster" else ratio <= self.value


@dataclass(frozen=True)
class Contest:
    """The same work, done in several ways.

    Args:
        what: one line.
        contestants: name -> does the work once and returns its output. All do the same amount.
        aims: ratios to report.
        count: units of work in one call.
        unit: of the work: "clips", "items", "steps".
        setting: what else decides the numbers, in JSON-able values.
        uncompared: contestants whose outputs are not compared: a bare kernel, which does less by design and shows the
            limit, or another's work with something added.
        tolerance: the largest difference between outputs.
        difference: of two outputs; by default the largest absolute one of their numbers.
        clock: "wall", or "cpu": seconds of this process and its ended children, over all threads, which other jobs of
            the machine change little: the cost on one core.
        warmups: calls of each contestant before the rounds; the outputs of the first are compared.
    """

    what: str
    contestants: Mapping[str, Callable[[], Any]]
    aims: Sequence[Aim]
    count: float = 1
    unit: str = "calls"
    setting: Mapping[str, Any] = field(default_factory=dict)
    uncompared: frozenset[str] = frozenset()
    tolerance: float = 0.0
    difference: Callable[[Any, Any], float] | None = None
    clock: Literal["wall", "cpu"] = "wall"
    warmups: int = 1


@dataclass(frozen=True)
class Gauge:
    """One number with a bound, no contest.

    Args:
        what: one line.
        measure: gives the number.
        unit: of it: "s", "MiB", "share".
        at_most, at_least: its bounds; the median must keep them.
        setting: what else decides it, in JSON-able values.
        rounds: how often it is measured; those of the user when None.
    """

    what: str
    measure: Callable[[], float]
    unit: str
    at_most: float | None = None
    at_least: float | None = None
    setting: Mapping[str, Any] = field(default_factory=dict)
    rounds: int | None = None

    def met(self, value: float) -> bool | None:
        """Whether a value keeps the bounds; None without one."""
        if self.at_most is None and self.at_least is None:
            return None
        return value <= (math.inf if self.at_most is None else self.at_most) and value >= (
            -math.inf if self.at_least is None else self.at_least
        )


Trial = Contest | Gauge


def hold(trial: Trial, rounds: int, tick: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Does a trial.

    Contestants run A B A B, so that a slow phase of the machine falls on all of them, and the ratio is taken within a
    round. Of every number the median, the least and the largest over rounds are told.

    Args:
        trial: what to do.
        rounds: how often each contestant is timed.
        tick: called after every call of a contestant or measure (see `calls_of`).

    Returns:
        the record, in JSON-able values.

    Raises:
        UnequalError: outputs differ by more than the tolerance.
        InputError: no round, or an aim names a contestant that is not there.
    """
    if rounds < 1:
        raise InputError(f"--rounds {rounds}: use 1 or more")
    record: dict[str, Any] = {"what": trial.what, "setting": dict(trial.setting), "load": [load_average()]}
    record |= _race(trial, rounds, tick) if isinstance(trial, Contest) else _gauge(trial, rounds, tick)
    record["load"].append(load_average())
    return record


def calls_of(trial: Trial, rounds: int) -> int:
    """How often `hold` ticks."""
    if isinstance(trial, Gauge):
        return trial.rounds or rounds
    return len(trial.contestants) * (trial.warmups + rounds)


def _race(contest: Contest, rounds: int, tick: Callable[[], None]) -> dict[str, Any]:
    for aim in contest.aims:
        if missing := {aim.ours, aim.other} - set(contest.contestants):
            raise InputError(f"bench {contest.what!r}: no contestant {sorted(missing)}")
    difference = _compare(contest, tick)
    for _ in range(contest.warmups - 1):
        for work in contest.contestants.values():
            work()
            tick()
    seconds: list[dict[str, float]] = []
    for _ in range(rounds):
        seconds.append({})
        for name, work in contest.contestants.items():
            seconds[-1][name] = _timed(work, contest.clock)
            tick()
    contestants = {}
    for name in contest.contestants:
        spread = _spread([one[name] for one in seconds])
        contestants[name] = {"seconds": spread, "per_second": contest.count / max(spread["median"], 1e-12)}
    ratios = []
    for aim in contest.aims:
        spread = _spread([aim.ratio(one) for one in seconds])
        ratios.append(
            {"ours": aim.ours, "other": aim.other, "kind": aim.kind, "ratio": spread, "aim": aim.value}
            | {"met": aim.met(spread["median"])}
        )
    return {
        "clock": contest.clock,
        "rounds": rounds,
        "count": contest.count,
        "unit": contest.unit,
        "contestants": contestants,
        "uncompared": sorted(contest.uncompared),
        "ratios": ratios,
        "difference": difference,
        "tolerance": contest.tolerance,
    }


def _gauge(gauge: Gauge, rounds: int, tick: Callable[[], None]) -> dict[str, Any]:
    values = []
    for _ in range(gauge.rounds or rounds):
        values.append(float(gauge.measure()))
        tick()
    spread = _spread(values)
    bounds = {"at_most": gauge.at_most, "at_least": gauge.at_least}
    return {"rounds": len(values), "unit": gauge.unit, "value": spread, **bounds, "met": gauge.met(spread["median"])}


def _compare(contest: Contest, tick: Callable[[], None]) -> float:
    """The first warm-up; the largest difference of any output from the first contestant's."""
    outputs = {}
    for name, work in contest.contestants.items():
        output = work()
        tick()
        if name not in contest.uncompared:
            outputs[name] = output.output if isinstance(output, Timed) else output
    (first, expected), *others = outputs.items()
    largest = 0.0
    for name, output in others:
        found = (contest.difference or largest_difference)(expected, output)
        if not found <= contest.tolerance:
            raise UnequalError(
                f"{contest.what}: the outputs of {first} and {name} differ by {found:.3g}, more than "
                f"{contest.tolerance:.3g}: their times do not compare"
            )
        largest = max(largest, found)
    return largest


def _timed(work: Callable[[], Any], clock: str) -> float:
    gc.collect()  # or one contestant pays for what another left behind
    read = time.perf_counter if clock == "wall" else cpu_seconds
    begun = read()
    output = work()
    taken = read() - begun
    return output.seconds if isinstance(output, Timed) else taken


def cpu_seconds() -> float:
    """CPU seconds of this process, its threads and its ended children so far."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def largest_difference(a: Any, b: Any) -> float:
    """Largest absolute difference of two outputs: numbers, arrays, tensors, or sequences and mappings of them.

    Returns:
        infinite where shapes, lengths, keys or other values differ, or a number is not finite.
    """
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return max((largest_difference(a[k], b[k]) for k in a), default=0.0) if a.keys() == b.keys() else math.inf
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        pairs = list(zip(a, b, strict=False))
        return max((largest_difference(x, y) for x, y in pairs), default=0.0) if len(a) == len(b) else math.inf
    if a is None or b is None or isinstance(a, (str, bytes)):
        return 0.0 if a is b or a == b else math.inf
    x, y = (np.asarray(v.detach().cpu().double() if isinstance(v, torch.Tensor) else v, np.float64) for v in (a, b))
    if x.shape != y.shape:
        return math.inf
    worst = float(np.abs(x - y).max()) if x.size else 0.0
    return worst if math.isfinite(worst) else math.inf


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def load_average() -> float:
    """Processes that wanted a core in the last minute, over the whole machine."""
    return round(os.getloadavg()[0], 2)


def machine() -> dict[str, Any]:
    """Versions and hardware behind the numbers."""
    # Lightning comes with it, and torchvision where that is: after prepare_torchvision.
    from gve.callbacks.run_record import versions_of

    return {
        "versions": {"gve": gve.__version__, "python": platform.python_version(), **versions_of(PACKAGES)},
        "hardware": {
            "machine": platform.machine(),
            "processor": _processor(),
            "cores": available_cores(),
            "threads": torch.get_num_threads(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        },
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread, as in a loader's worker."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
