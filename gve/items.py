"""The vocabulary: what is embedded (Item), what is trained on (Pair), and what a model is fed (EmbedBatch, TrainBatch).

Letters used in shapes everywhere: B batch, N hard negatives, L tokens, T frames, D embedding, Q queries, C corpus,
W world size.

This module imports no torch at run time, so that `python -m gve --help` and the shard tools start fast.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch


class InputError(ValueError):
    """The user's input cannot be used; the message is one line that names the value and the fix.

    Commands print it and exit with 2.
    """


def one_line(text: str, limit: int = 400) -> str:
    """The text on one line of at most `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


@dataclass(frozen=True, eq=False)
class Frames:
    """Decoded frames of one clip.

    Args:
        pixels: [T, H, W, 3] uint8, RGB, upright (rotation applied).
        times_s: [T] float64, presentation time of each frame in seconds after the first frame of the file, or of the
            span of it that was read.
        indices: [T] int64, index of each frame among those of the file or span; rises, and repeats where the clip is
            too short.
        num_frames: frames in the whole file or span, after decoding rules (N of the released rule).
        native_fps: average frame rate of the file, in Hz.
    """

    pixels: np.ndarray
    times_s: np.ndarray
    indices: np.ndarray
    num_frames: int
    native_fps: float

    @property
    def sampled_fps(self) -> float:
        """Rate of the kept frames by the released rule, in Hz: T / N * native_fps (gve.md section 2)."""
        return len(self.indices) / self.num_frames * self.native_fps


MediaSource = str | Path | bytes | np.ndarray | Frames


@dataclass(frozen=True)
class Text:
    """A piece of text."""

    text: str

    def content_hash(self) -> str:
        return hashlib.sha256(b"text\0" + self.text.encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Media:
    """Common part of Image and Video.

    Args:
        source: path or bytes of a file, or decoded pixels: [H, W, 3] uint8 RGB for an image, Frames for a video.
        sha256: hash of the file's bytes where it is known already (shards store it); computed when empty.
        name: what to call it in messages: a path, a shard member.
    """

    source: MediaSource
    sha256: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        if not self.name and isinstance(self.source, (str, Path)):
            object.__setattr__(self, "name", str(self.source))

    def content_hash(self) -> str:
        """Hex SHA-256 of what is shown: the file's bytes, or the pixels and the times.

        Raises:
            OSError: the path cannot be read.
        """
        if self.sha256:
            return self.sha256
        digest = hashlib.sha256()
        if isinstance(self.source, bytes):
            digest.update(self.source)
        elif isinstance(self.source, np.ndarray):
            digest.update(repr(self.source.shape).encode() + np.ascontiguousarray(self.source).tobytes())
        elif isinstance(self.source, Frames):
            digest.update(repr(self.source.pixels.shape).encode() + np.ascontiguousarray(self.source.pixels).tobytes())
            digest.update(np.asarray(self.source.times_s, np.float64).tobytes())
        else:
            with open(self.source, "rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
        object.__setattr__(self, "sha256", digest.hexdigest())
        return self.sha256


@dataclass(frozen=True, eq=False)
class Image(Media):
    """A still image."""


@dataclass(frozen=True, eq=False)
class Video(Media):
    """A clip: a file, or a span of one that is read as if it were a file of its own and never cut out.

    Args:
        span_s: first and last second of the span, counted from the first frame of the file; None is all of it.
    """

    span_s: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.span_s is None:
            return
        start_s, end_s = self.span_s
        if not 0 <= start_s < end_s < math.inf:
            raise InputError(f"{self.name or 'clip'}: span {start_s:g} s to {end_s:g} s is empty or begins before 0")
        if not isinstance(self.source, (str, Path, bytes)):
            raise InputError(f"{self.name or 'clip'}: a span needs a file, decoded frames have none")

    def content_hash(self) -> str:
        """As of every medium; a span of a file is another content than the file. `sha256` is always the file's."""
        own = super().content_hash()
        if self.span_s is None:
            return own
        return hashlib.sha256(f"{own}\0{self.span_s[0]!r}\0{self.span_s[1]!r}".encode()).hexdigest()


Part = Text | Image | Video


@dataclass(frozen=True)
class Item:
    """What one embedding stands for: ordered text, image and video parts, and the instruction of a query.

    Args:
        parts: the content in reading order.
        instruction: what the query asks for; empty for targets. It steers the embedding and is no content.
        id: the name of the item in its corpus or query set; empty where nothing refers to it.
    """

    parts: tuple[Part, ...]
    instruction: str = ""
    id: str = ""

    @classmethod
    def of(
        cls,
        text: str | None = None,
        image: MediaSource | None = None,
        video: MediaSource | None = None,
        *,
        instruction: str = "",
        id: str = "",
    ) -> Item:
        """An item of at most one image, one video and one text, in that order (media come before text)."""
        parts: list[Part] = []
        if image is not None:
            parts.append(Image(image))
        if video is not None:
            parts.append(Video(video))
        if text:
            parts.append(Text(text))
        return cls(tuple(parts), instruction, id)

    @property
    def text(self) -> str:
        """All text parts, joined by one space."""
        return " ".join(part.text for part in self.parts if isinstance(part, Text))

    @property
    def media(self) -> tuple[Image | Video, ...]:
        """The image and video parts in order."""
        return tuple(part for part in self.parts if isinstance(part, (Image, Video)))

    @property
    def modality(self) -> str:
        """The letters of what it holds, in the order T, I, V: "T", "I", "V", "TI", "TV", "IV", "TIV"."""
        kinds = {type(part) for part in self.parts}
        return "".join(letter for letter, kind in (("T", Text), ("I", Image), ("V", Video)) if kind in kinds)

    def content_hash(self) -> str:
        """Hex SHA-256 of the parts in order, without the instruction: equal content gives equal hashes."""
        digest = hashlib.sha256()
        for part in self.parts:
            digest.update(type(part).__name__.encode() + b"\0" + part.content_hash().encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Pair:
    """One training sample: a query, its target, and hard negatives of this pair.

    Args:
        key: globally unique sample key, `<source>_<nnnnnn>_<nnnn>`.
        source: name of the training source (a row of the mixture).
        task: modality task, for example "T2V" or "TI2V".
    """

    query: Item
    target: Item
    negatives: tuple[Item, ...] = ()
    key: str = ""
    source: str = ""
    task: str = ""


Batch = TypeVar("Batch", bound="_Tensors")


class _Tensors:
    """Moves every tensor of a frozen dataclass, nested ones too.

    Lightning and DataLoader call `to` and `pin_memory` on objects that have them.
    """

    def _map(self: Batch, method: str, *args: Any, **kwargs: Any) -> Batch:
        changes = {}
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if hasattr(value, method) and hasattr(value, "to"):
                changes[field.name] = getattr(value, method)(*args, **kwargs)
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    def to(self: Batch, *args: Any, **kwargs: Any) -> Batch:
        return self._map("to", *args, **kwargs)

    def pin_memory(self: Batch) -> Batch:
        return self._map("pin_memory")


@dataclass(frozen=True, eq=False)
class EmbedBatch(_Tensors):
    """What the model is fed for B items.

    Args:
        input_ids: [B, L] int64, with one placeholder id per merged vision token.
        attention_mask: [B, L] int64, 1 on real tokens.
        position_ids: [3, B, L] int64, M-RoPE positions (time, height, width) by the policy's rule.
        pool_index: [B] int64, where the embedding is read: the last attended token.
        content_ids: [B] int64, first 8 bytes of the item's content hash; equal content has equal ids.
        valid: [B] bool, False on rows whose media could not be read: they carry an empty text, and the loss ignores
            them.
        image_patches: [P, patch_dim] uint8, patches of all images in order of appearance, or None. They travel as
            bytes and are normalised where the tower runs (`gve.inputs.normalised`): a quarter of the memory shared
            with loader workers and of the copy to the device.
        image_grid: [images, 3] int64, (t, h, w) in patches, or None.
        image_keys: a key per image; equal keys have equal pixels, so the tower may run once for them.
        image_rows: row of the batch that each image stands in; rising.
        video_patches, video_grid, video_keys, video_rows: the same for videos.
        pixel_mean, pixel_std: of the three colours on a scale of 0 to 1, for both kinds of patches.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    pool_index: torch.Tensor
    content_ids: torch.Tensor
    valid: torch.Tensor
    image_patches: torch.Tensor | None = None
    image_grid: torch.Tensor | None = None
    image_keys: tuple[str, ...] = ()
    image_rows: tuple[int, ...] = ()
    video_patches: torch.Tensor | None = None
    video_grid: torch.Tensor | None = None
    video_keys: tuple[str, ...] = ()
    video_rows: tuple[int, ...] = ()
    pixel_mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    pixel_std: tuple[float, ...] = (1.0, 1.0, 1.0)

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])


@dataclass(frozen=True, eq=False)
class TrainBatch(_Tensors):
    """One step's rows of one rank, all of one task and one source.

    Args:
        query: B queries.
        target: B targets, row i belongs to query i.
        negatives: hard negatives of all rows, flat, or None.
        negative_index: [B, N] int64, rows of `negatives` that belong to each pair, -1 where a pair has fewer.
        task: modality task, for example "T2V".
        source: training source.
        epoch, step: epoch, and step inside the epoch, that planned this batch.
        seed: 63-bit seed of this (seed, epoch, step, rank): dropout is drawn from it, so a replay is exact.
        rows: (pass, position) of each pair in its source's order.
        skipped: (sample key, reason) of the rows that could not be read.
    """

    query: EmbedBatch
    target: EmbedBatch
    negatives: EmbedBatch | None
    negative_index: torch.Tensor
    task: str
    source: str
    epoch: int
    step: int
    seed: int
    rows: tuple[tuple[int, int], ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.query)
