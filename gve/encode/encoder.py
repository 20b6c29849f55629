"""Items to vectors: what any model must offer, and the project's own model behind it."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from rich import get_console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.data import DataLoader, Dataset

from gve import video
from gve.inputs import InputBuilder, InputPolicy
from gve.items import EmbedBatch, Image, InputError, Item, Part, Video
from gve.model.backbone import Backbone

# What a worker hands over at once, at most: 20 clips of 8 frames at 200 tokens are 600 MB of patches.
GROUP_ITEMS = 64
GROUP_TOKENS = 16384


@dataclass(frozen=True, eq=False)
class Encoded:
    """Vectors of N items.

    Args:
        vectors: [N, D] float32 unit rows; NaN where the item could not be read.
        failures: row -> why it could not be read.
        tokens: [N] int64, length of each input, vision tokens counted; 0 where it could not be read. None of encoders
            that do not count.
    """

    vectors: np.ndarray
    failures: Mapping[int, str] = field(default_factory=dict)
    tokens: np.ndarray | None = None


class Transform(Protocol):
    """A change of what the model is shown, for example frames in another order.

    It is applied to decoded items inside the workers, so it must pickle and be a pure function of the item.
    """

    @property
    def name(self) -> str:
        """Names the change in keys of stored vectors."""

    def touches(self, item: Item) -> bool:
        """Whether it changes this (undecoded) item; others keep their plain vector."""

    def __call__(self, item: Item) -> Item:
        """The changed item: videos hold Frames, images hold pixels."""


class Encoder(Protocol):
    """Anything that turns items into vectors whose dot products are similarities."""

    @property
    def dim(self) -> int:
        """D, the length of a vector."""

    @property
    def fingerprint(self) -> str:
        """Names weights and input policy: vectors of equal fingerprints may be compared and kept."""

    def encode(self, items: Sequence[Item], *, transform: Transform | None = None, progress: str = "") -> Encoded:
        """Vectors of the items, in their order.

        Args:
            items: any mix of modalities.
            transform: changes each item after decoding.
            progress: what to write beside the progress bar; no bar when empty.
        """


class LoadedEncoder(Encoder, Protocol):
    """An encoder with a model behind it: what a result file says about it."""

    @property
    def weights_hash(self) -> str:
        """Hex SHA-256 that names the weights alone; the input policy is no part of it."""

    @property
    def inputs(self) -> dict[str, Any]:
        """Everything but the weights that decides the vectors, in plain values for JSON: frames, budgets, prompt."""


@dataclass(frozen=True)
class Execution:
    """How an encoder runs. It decides time and memory, and of the vectors no more than their rounding.

    Args:
        device: torch device.
        dtype: of the weights; adapters of a checkpoint are always float32.
        attention: kernel: "sdpa", "eager" or "flash_attention_2".
        batch_tokens: most tokens of one forward pass, padding included. Models that do not count tokens have a
            batch size of their own.
        num_workers: loader processes that decode; 0 decodes in the calling one.
    """

    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: str = "sdpa"
    batch_tokens: int = 16384
    num_workers: int = 0


def decoded(item: Item, policy: InputPolicy) -> Item:
    """The item with its media decoded: clips to Frames in a killable child, images to pixels.

    Media keep the hash of their file, so they stay the same content to every cache.

    Raises:
        MediaError: a file cannot be read; says which and why.
    """

    def part(part: Part) -> Part:
        if isinstance(part, Video) and isinstance(part.source, (str, Path, bytes)):
            frames = video.decode_guarded(part.source, policy.sampling, name=part.name, span_s=part.span_s)
            return Video(frames, part.content_hash(), part.name)
        if isinstance(part, Image) and isinstance(part.source, (str, Path, bytes)):
            return Image(video.decode_image(part.source, name=part.name), part.content_hash(), part.name)
        return part

    return dataclasses.replace(item, parts=tuple(part(own) for own in item.parts))


def item_key(item: Item) -> str:
    """Hex SHA-256 of what is encoded: content and instruction; the id is no part of it.

    Raises:
        OSError: a file cannot be read.
    """
    return hashlib.sha256(f"{item.instruction}\0{item.content_hash()}".encode()).hexdigest()


Rows = list[int]
Group = tuple[list[tuple[Rows, EmbedBatch]], dict[int, str]]
"""What a worker returns: batches with the rows they belong to, and the rows that failed."""


class _Preparation(Dataset[Group]):
    """Decodes, transforms and collates groups of items; runs in loader workers."""

    def __init__(
        self,
        items: Sequence[Item],
        groups: Sequence[Rows],
        builder: InputBuilder,
        transform: Transform | None,
        batch_tokens: int,
    ) -> None:
        self.items, self.groups = items, groups
        self.builder, self.transform, self.batch_tokens = builder, transform, batch_tokens

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> Group:
        ready, failures = {}, {}
        for row in self.groups[index]:
            try:
                item = decoded(self.items[row], self.builder.policy)
                if self.transform is not None and self.transform.touches(item):
                    item = self.transform(item)
                ready[row] = self.builder.prepare(item)
            except InputError as error:
                failures[row] = str(error)
        batches = []
        by_length = sorted(ready, key=lambda row: len(ready[row].ids))
        while by_length:
            longest = len(ready[by_length[-1]].ids)
            taken = by_length[-max(1, self.batch_tokens // longest) :]
            del by_length[-len(taken) :]
            batches.append((taken, self.builder.collate([ready[row] for row in taken])))
        return batches, failures


class _Replay:
    """Prepared groups with the tower's tokens in place of the patches, kept in host memory up to a limit.

    The tower is frozen, so the untrained base and every later checkpoint can start from here: no decoding, no tower.
    What comes first stays: a scan that is longer than the memory still finds its beginning, where a queue of the most
    recent would find nothing.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.room = limit_bytes
        self.groups: dict[str, tuple[list[tuple[Rows, EmbedBatch, dict]], dict[int, str]]] = {}

    def offer(self, key: str, batches: list[tuple[Rows, EmbedBatch, dict]], failures: dict[int, str]) -> None:
        size = 0
        kept = []
        for rows, batch, features in batches:
            light = dataclasses.replace(batch, image_patches=None, video_patches=None).to("cpu")
            tokens = {name: value.to("cpu") for name, value in features.items()}
            size += sum(value.numel() * value.element_size() for value in tokens.values())
            size += 8 * (light.input_ids.numel() * 5)
            kept.append((rows, light, tokens))
        if size <= self.room:
            self.room -= size
            self.groups[key] = (kept, failures)


class BackboneEncoder:
    """Encodes with a Backbone: decoding in workers, batches of equal length under a token budget.

    Weights and modes are as before when it returns, and no random number is drawn: it may run inside training.

    Args:
        backbone: the model; its device is where batches go.
        builder: inputs by the evaluation's policy.
        batch_tokens: most tokens of one forward pass, padding included.
        num_workers: loader processes for decoding; 0 decodes in this one.
        memory_bytes: host memory for prepared inputs and tower tokens, so that the same items under other adapters
            are neither decoded nor seen by the tower again; 0 for none.
    """

    def __init__(
        self,
        backbone: Backbone,
        builder: InputBuilder,
        *,
        batch_tokens: int = 16384,
        num_workers: int = 0,
        memory_bytes: int = 0,
    ) -> None:
        self.backbone, self.builder = backbone, builder
        self.batch_tokens, self.num_workers = batch_tokens, num_workers
        self._adapters = True
        self._replay = _Replay(0 if backbone.tower_trains else memory_bytes)

    @property
    def dim(self) -> int:
        return self.backbone.dim

    @property
    def weights_hash(self) -> str:
        """Hex SHA-256 of the weights that answer, adapters included if they are on."""
        with self._weights():
            return self.backbone.weights_hash()

    @property
    def inputs(self) -> dict[str, Any]:
        return self.builder.policy.to_dict()

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.weights_hash}\0{self.builder.policy.digest()}".encode()).hexdigest()

    def untrained(self) -> BackboneEncoder:
        """The same base with its adapters off; it shares the memory of prepared inputs."""
        other = copy.copy(self)
        other._adapters = False
        return other

    def encode(self, items: Sequence[Item], *, transform: Transform | None = None, progress: str = "") -> Encoded:
        vectors = np.full((len(items), self.dim), np.nan, np.float32)
        tokens = np.zeros(len(items), np.int64)
        failures: dict[int, str] = {}
        keys: dict[int, str] = {}
        for row, item in enumerate(items):
            try:
                keys[row] = item_key(item)
            except OSError as error:
                failures[row] = f"missing: {error.filename} ({error.strerror})"
        groups = self._groups(items, list(keys))
        kind = transform.name if transform else ""
        names = [
            hashlib.sha256("".join([kind, *(keys[row] for row in group)]).encode()).hexdigest() for group in groups
        ]
        with self._weights(), torch.inference_mode(), progress_bar(progress, len(items)) as advance:
            advance(len(failures))
            fresh = []
            for group, name in zip(groups, names, strict=True):
                known = self._replay.groups.get(name)
                if known is None:
                    fresh.append((group, name))
                    continue
                failures |= {group[place]: reason for place, reason in known[1].items()}
                for places, batch, features in known[0]:
                    rows = [group[place] for place in places]
                    vectors[rows] = self._embed(batch, features)
                    tokens[rows] = batch.attention_mask.sum(1).numpy()
                advance(len(group))
            loader = DataLoader(
                _Preparation(items, [group for group, _ in fresh], self.builder, transform, self.batch_tokens),
                batch_size=None,
                num_workers=self.num_workers,
                generator=torch.Generator(),  # else each loader draws its workers' seed from the global generator
            )
            for (group, name), (batches, lost) in zip(fresh, loader, strict=True):
                place = {row: at for at, row in enumerate(group)}
                kept = []
                for rows, batch in batches:
                    tokens[rows] = batch.attention_mask.sum(1).numpy()
                    batch = batch.to(self._device)
                    features = dict(self.backbone.media_features(batch))
                    vectors[rows] = self._embed(batch, features)
                    kept.append(([place[row] for row in rows], batch, features))
                self._replay.offer(name, kept, {place[row]: reason for row, reason in lost.items()})
                failures |= lost
                advance(len(group))
        return Encoded(vectors, failures, tokens)

    @property
    def _device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    def _embed(self, batch: EmbedBatch, features: Mapping) -> np.ndarray:
        features = {name: tokens.to(self._device) for name, tokens in features.items()}
        return self.backbone(batch.to(self._device), features).float().cpu().numpy()

    def _groups(self, items: Sequence[Item], rows: Rows) -> list[Rows]:
        """Rows cut into groups of like length, by what is known before decoding; the longest first."""
        policy = self.builder.policy
        clip = policy.sampling.num_frames // 2 * policy.max_frame_tokens

        def bound(item: Item) -> int:
            """Most tokens it may have; a token of text is about four letters."""
            media = sum(clip if isinstance(part, Video) else policy.max_image_tokens for part in item.media)
            return media + min(policy.max_length, len(item.text) // 4 + 32)

        bounds = {row: bound(items[row]) for row in rows}
        groups: list[Rows] = []
        room = 0
        for row in sorted(rows, key=lambda row: -bounds[row]):
            if room < bounds[row] or len(groups[-1]) == GROUP_ITEMS:
                groups.append([])
                room = max(self.batch_tokens, GROUP_TOKENS, bounds[row])
            groups[-1].append(row)
            room -= bounds[row]
        return groups

    @contextmanager
    def _weights(self) -> Iterator[None]:
        """Eval mode and the asked adapters inside; afterwards every module is in the mode it was in."""
        modes = {module: module.training for module in self.backbone.modules()}
        self.backbone.eval()
        try:
            if self._adapters:
                yield
            else:
                with self.backbone.adapters_off():
                    yield
        finally:
            for module, mode in modes.items():
                module.training = mode


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[int], object]]:
    """A progress bar, or nothing without a title; yields the function that advances it."""
    if not title:
        yield lambda count: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # On a pipe or in a log file a bar would leave nothing but blank lines.
    with Progress(*columns, transient=True, disable=not get_console().is_terminal) as progress:
        task = progress.add_task(title, total=total)
        yield lambda count: progress.advance(task, count)
