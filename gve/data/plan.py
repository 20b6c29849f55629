"""The plan: which source and which rows every step of an epoch trains on, as a pure function.

There is no shuffle buffer, and no worker appears in any key: who builds a batch never changes what is in it. Every
draw is made of raw Philox words (numpy keeps them stable over versions, `choice` and `permutation` it does not)
under a key hashed from named fields.

Rows of a source are passed over again and again. The order in one pass: shards permuted, cut into windows of
`window_shards` shards, rows permuted inside each window; so reading stays near, and any place of any pass is found
without walking to it. A step of source k takes the global batch [c, c + B_k) of that endless order; rank r takes
rows r::W of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from gve.items import InputError

_STATE_EPOCHS = 8
"""Epochs whose weights and scores stay in the state, so that it stays below 10 KB with 38 sources."""


def key_of(*fields: int | str) -> int:
    """63-bit key of named fields: from the first 8 bytes of SHA-256 over their JSON."""
    digest = hashlib.sha256(json.dumps(fields).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def raw_words(count: int, *fields: int | str) -> np.ndarray:
    """[count] uint64 raw Philox words under the key of the fields."""
    return np.random.Philox(key=key_of(*fields)).random_raw(count)


def permutation(count: int, *fields: int | str) -> np.ndarray:
    """[count] int64, a permutation of 0 .. count - 1: argsort of raw words."""
    return np.argsort(raw_words(count, *fields), kind="stable")


def draw(weights: Sequence[float], count: int, *fields: int | str) -> np.ndarray:
    """[count] int64 indices drawn with the given weights: inverse CDF of 53-bit uniform numbers."""
    cdf = np.cumsum(np.asarray(weights, np.float64))
    uniform = (raw_words(count, *fields) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    # A weight of 0 is a flat place of the CDF and is never drawn: side="right" skips it, the clip guards the last.
    last = int(np.flatnonzero(np.asarray(weights))[-1])
    return np.minimum(np.searchsorted(cdf / cdf[-1], uniform, side="right"), last)


@dataclass(frozen=True, eq=False)
class PlannedSource:
    """What the plan needs to know of a source.

    Args:
        name, task, level: as in the manifest.
        batch: global batch, rows of one step over all ranks.
        shard_sizes: [shards] int64, rows of each shard, held-out rows included.
        held_out: sorted row numbers that are never trained on.

    Raises:
        InputError: the batch is larger than the source.
    """

    name: str
    task: str
    level: int
    batch: int
    shard_sizes: np.ndarray
    held_out: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    def __post_init__(self) -> None:
        if not 1 <= self.batch <= self.size:
            raise InputError(
                f"source {self.name}: a global batch of {self.batch} from {self.size} training rows: "
                "set batch_size between 1 and that, or leave the source out"
            )

    @property
    def size(self) -> int:
        """Training rows."""
        return int(self.shard_sizes.sum()) - len(self.held_out)


class PassOrder:
    """The endless order of a source's training rows.

    Args:
        source: the source.
        seed: of the run.
        window_shards: shards that are mixed with one another.
    """

    def __init__(self, source: PlannedSource, seed: int, window_shards: int = 16) -> None:
        if window_shards < 1:
            raise InputError(f"window_shards {window_shards}: use 1 or more")
        self._source, self._seed, self._window_shards = source, seed, window_shards
        starts = np.concatenate(([0], np.cumsum(source.shard_sizes)))
        self._starts = starts[:-1]
        held_out = np.diff(np.searchsorted(source.held_out, starts))
        self._sizes = source.shard_sizes - held_out
        self._remember()

    def _remember(self) -> None:
        # A batch may touch two windows, and two passes: keep some more than that, each is small.
        self._shards = lru_cache(maxsize=4)(self._permute_shards)
        self._window = lru_cache(maxsize=4)(self._permute_window)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_shards", "_window")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._remember()

    def __call__(self, places: Iterable[int]) -> tuple[tuple[int, int, int], ...]:
        """Places of the endless order, as (pass, position in the pass, row)."""
        found = []
        for place in places:
            number, position = divmod(place, self._source.size)
            _, bounds = self._shards(number)
            window = int(np.searchsorted(bounds, position, side="right")) - 1
            row = self._window(number, window)[position - int(bounds[window])]
            found.append((number, position, int(row)))
        return tuple(found)

    def _permute_shards(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        order = permutation(len(self._sizes), self._seed, "shards", self._source.name, number)
        ends = np.cumsum(self._sizes[order])[self._window_shards - 1 :: self._window_shards]
        return order, np.concatenate(([0], ends[ends < self._source.size]))

    def _permute_window(self, number: int, window: int) -> np.ndarray:
        order, _ = self._shards(number)
        shards = order[window * self._window_shards : (window + 1) * self._window_shards]
        rows = np.concatenate(
            [np.arange(self._starts[shard], self._starts[shard] + self._source.shard_sizes[shard]) for shard in shards]
        )
        rows = rows[~np.isin(rows, self._source.held_out)]
        return rows[permutation(len(rows), self._seed, "window", self._source.name, number, window)]


@dataclass(frozen=True)
class Rows:
    """What one rank trains on in one step.

    Args:
        epoch, step: the step, both from 0.
        source: index of the source in the plan.
        places: (pass, position, row) of each pair, this rank's share of the global batch in order.
        seed: 63-bit seed of (seed, epoch, step, rank) for everything the step draws.
    """

    epoch: int
    step: int
    source: int
    places: tuple[tuple[int, int, int], ...]
    seed: int


class EpochPlan:
    """All steps of one epoch, or what is left of them after a resume.

    Args:
        sources: every source of the run; their order is part of the plan.
        seed: of the run.
        epoch: from 0.
        num_steps: steps of the whole epoch.
        weights: unit -> probability; the keys are tasks, sources or levels, as `unit` says.
        unit: "task", "source" or "level".
        first_step: steps of this epoch that are done already.
        cursors: source -> rows drawn from it since the run began, up to `first_step`.
    """

    def __init__(
        self,
        sources: Sequence[PlannedSource],
        *,
        seed: int,
        epoch: int,
        num_steps: int,
        weights: Mapping[str, float],
        unit: str = "task",
        first_step: int = 0,
        cursors: Mapping[str, int] | None = None,
    ) -> None:
        self.sources = tuple(sources)
        self.epoch, self.num_steps, self.first_step, self._seed = epoch, num_steps, first_step, seed
        groups = units_of(self.sources, unit)
        if set(groups) != set(weights):
            raise InputError(f"weights for {sorted(weights)}, but the shards hold the {unit}s {sorted(groups)}")
        names = sorted(groups)
        units = draw([weights[name] for name in names], num_steps, seed, unit, epoch)
        self.source_of = np.zeros(num_steps, np.int64)
        """[num_steps] int64, index of the source of each step."""
        for place, name in enumerate(names):
            inside = [self.sources[k].size for k in groups[name]]
            # One stream per unit, addressed by the step: what is drawn elsewhere does not shift it.
            drawn = np.asarray(groups[name])[draw(inside, num_steps, seed, "source", name, epoch)]
            self.source_of = np.where(units == place, drawn, self.source_of)
        self._cursors = {source.name: int((cursors or {}).get(source.name, 0)) for source in self.sources}
        self._first_row = self._offsets()
        self._orders = [PassOrder(source, seed) for source in self.sources]

    def _offsets(self) -> np.ndarray:
        """[num_steps] int64, place in its source's endless order where each step begins."""
        offsets = np.zeros(self.num_steps, np.int64)
        for k, source in enumerate(self.sources):
            steps = np.flatnonzero(self.source_of == k)
            drawn = np.searchsorted(steps, self.first_step)
            offsets[steps] = self._cursors[source.name] + (np.arange(len(steps)) - drawn) * source.batch
        return offsets

    def rows(self, step: int, rank: int = 0, world: int = 1) -> Rows:
        """The rows of one rank in one step.

        Raises:
            InputError: the global batch cannot be divided over the ranks.
        """
        if not self.first_step <= step < self.num_steps:
            raise IndexError(f"step {step} is outside {self.first_step} to {self.num_steps - 1}")
        k = int(self.source_of[step])
        source = self.sources[k]
        if source.batch % world:
            raise InputError(f"source {source.name}: global batch {source.batch} cannot be split over {world} ranks")
        first = int(self._first_row[step])
        places = self._orders[k](range(first + rank, first + source.batch, world))
        return Rows(self.epoch, step, k, places, key_of(self._seed, "step", self.epoch, step, rank))

    def cursors(self, step: int) -> dict[str, int]:
        """Source name -> rows drawn since the run began, when `step` steps of this epoch are done."""
        done = np.bincount(self.source_of[self.first_step : step], minlength=len(self.sources))
        return {
            source.name: self._cursors[source.name] + int(count) * source.batch
            for source, count in zip(self.sources, done, strict=True)
        }


def hold_out(index: np.ndarray, count: int, seed: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Chooses the dev rows of a source by a seeded rule: the first rows of one permutation.

    Args:
        index: [rows, 2] uint64, content ids of query and target.
        count: dev rows wanted; a source gives at most a tenth of its rows.
        seed: of the run.
        name: of the source.

    Returns:
        (dev rows, sorted; rows that must not be trained on, sorted: the dev rows and every copy of such a pair).
    """
    count = min(count, len(index) // 10)
    if count <= 0:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    dev = np.sort(permutation(len(index), seed, "dev", name)[:count])
    # An odd multiplier keeps the order of the two ids: (a, b) and (b, a) are two pairs. Overflow wraps, as meant.
    pairs = index[:, 0] * np.uint64(0x9E3779B97F4A7C15) + index[:, 1]
    return dev, np.flatnonzero(np.isin(pairs, pairs[dev]))


def units_of(sources: Sequence[PlannedSource], unit: str) -> dict[str, list[int]]:
    """Unit -> indices of its sources, for the unit "task", "source" or "level"."""
    names = {"task": "task", "source": "name", "level": "level"}
    groups: dict[str, list[int]] = {}
    for k, source in enumerate(sources):
        groups.setdefault(str(getattr(source, names[unit])), []).append(k)
    return groups


@dataclass(frozen=True)
class PlanState:
    """Where a run stands: all that a resume needs, the same on every rank, JSON below 10 KB.

    Args:
        seed: of the run.
        epoch: from 0.
        step: completed optimizer steps of that epoch.
        cursors: source -> rows drawn since the run began.
        weights: epoch -> unit -> probability (rounded to 1e-9), of the newest epochs; an epoch that began keeps them.
        scores: epoch -> unit -> probe score (rounded to 1e-6) that the weights of that epoch are made of.
        manifest: digest of the data manifest.
        negatives: digest of the file of mined negatives; empty without one.
    """

    seed: int
    epoch: int = 0
    step: int = 0
    cursors: dict[str, int] = field(default_factory=dict)
    weights: dict[str, dict[str, float]] = field(default_factory=dict)
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    manifest: str = ""
    negatives: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able primitives: units are named once, and weights and scores are lists in their order."""
        state = asdict(self)
        units = sorted({unit for values in (*self.weights.values(), *self.scores.values()) for unit in values})
        for name in ("weights", "scores"):
            newest = sorted(state[name], key=int)[-_STATE_EPOCHS:]
            state[name] = {epoch: [state[name][epoch][unit] for unit in units] for epoch in newest}
        return {**state, "units": units}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PlanState:
        """The inverse of to_dict.

        Raises:
            InputError: the fields are not those of this version.
        """
        try:
            state = dict(values)
            units = state.pop("units")
            for name in ("weights", "scores"):
                state[name] = {epoch: dict(zip(units, row, strict=True)) for epoch, row in state[name].items()}
            return cls(**state)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"the checkpoint's data state is of another version: {error!r}") from error

    def check(self, seed: int, manifest: str, negatives: str = "") -> None:
        """Raises InputError unless the state belongs to this seed, these shards and these negatives."""
        for name, stored, given in (
            ("seed", self.seed, seed),
            ("shards (manifest digest)", self.manifest, manifest),
            ("mined negatives (digest)", self.negatives, negatives),
        ):
            if stored != given:
                raise InputError(f"the checkpoint was made with other {name}: {stored!r}, now {given!r}")
