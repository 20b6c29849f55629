"""How long the inputs of a source are: measured on some rows of its shards, or assumed.

Measured from texts and the headers of media; no clip is decoded.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PilImage

from gve.data.sources import Source
from gve.inputs import InputBuilder, InputPolicy, VisionGeometry, smart_size
from gve.items import Image, InputError, Item, Text, Video
from gve.plan_report.costs import Pictures, config_file
from gve.video import Sampling, frame_indices, probe

TEMPLATE_TOKENS = 20
"""Tokens of the prompt around an item, appended `<|endoftext|>` included, under Qwen's tokenizer."""

TOKENS_PER_WORD = 1.2
"""Of English captions under Qwen's tokenizer: 1.05 on MSR-VTT's 1,000 test captions, 1.10 on DiDeMo's 4,021."""

JPEG_BYTES_PER_PX = 0.33
"""Of frames stored at quality 95: the mean of 124 frames of 31 real clips, scaled to at most 156,800 px."""


@dataclass(frozen=True)
class Assumptions:
    """What stands in for rows where there are no shards to read.

    Args:
        clip_s: length of a clip, in seconds.
        frame: width and height of a clip, in pixels.
        image: width and height of an image, in pixels.
        text_words: words of a text.
    """

    clip_s: float = 15.0
    frame: tuple[int, int] = (1280, 720)
    image: tuple[int, int] = (640, 480)
    text_words: float = 40.0

    def __post_init__(self) -> None:
        if min(self.clip_s, *self.frame, *self.image) <= 0 or self.text_words < 0:
            raise InputError(f"{self}: lengths and sizes must be above 0")


@dataclass(frozen=True)
class Side:
    """Lengths of the queries, or of the targets, of a source.

    Args:
        tokens: mean length of an input.
        padded: longest length seen: what a batch is padded to where its rows run as one; an upper view, since rows of
            like length run together.
        grids: (t, h, w) in patches of all pictures that were seen.
        items: inputs that were seen.
    """

    tokens: float
    padded: float
    grids: tuple[tuple[int, int, int], ...]
    items: int = 1

    def pictures(self, rows: float) -> list[Pictures]:
        """What the tower sees of so many rows, all distinct."""
        return [Pictures(rows * count / self.items, grid) for grid, count in sorted(Counter(self.grids).items())]

    def stored_bytes(self, geometry: VisionGeometry) -> float:
        """Estimated bytes of an item in a shard: pictures as JPEG at the size the model sees, 1 KB for the rest."""
        frames = sum(t * (1 if t == 1 else geometry.temporal_patch) * h * w for t, h, w in self.grids) / self.items
        return 1024 + JPEG_BYTES_PER_PX * frames * geometry.patch**2


class Lengths:
    """How long the inputs of a source are.

    Args:
        base: its tokenizer is used where it lies on this machine, else texts are counted by their words.
        policy: of the run.
        assumed: for what is not known.

    Raises:
        InputError: the base's config cannot be found.
    """

    def __init__(self, base: str, policy: InputPolicy, assumed: Assumptions) -> None:
        self._policy, self._assumed = policy, assumed
        self.geometry = VisionGeometry.from_config(config_file(base))
        self._builder: InputBuilder | None = None
        if (Path(base) / "tokenizer.json").is_file():
            self._builder = InputBuilder.from_base(base, policy)

    @property
    def exact(self) -> bool:
        """Whether texts are counted by the base's own tokenizer."""
        return self._builder is not None

    def assume(self, task: str, instruction: str) -> tuple[Side, Side]:
        """(query, target) of an assumed row of a task."""
        query, target = task.split("2")
        return self._assume(query, len(instruction.split())), self._assume(target, 0)

    def measure(self, source: Source, rows: Sequence[int], wanted: int) -> tuple[Side, Side, float]:
        """(query, target, mean of the hard negatives that a run uses) of some rows: their texts and media headers.

        Args:
            source: of a shard folder.
            rows: row numbers.
            wanted: most hard negatives used per pair.
        """
        sides: dict[str, list[tuple[int, list[tuple[int, int, int]]]]] = {"query": [], "target": []}
        negatives = 0
        for row in rows:
            members = source.members(row)
            record = json.loads(members["json"])
            negatives += min(len(record["negatives"]), wanted)
            for role in sides:
                sides[role].append(self._measure(record[role], members, source.record.instruction * (role == "query")))
        found = []
        for each in sides.values():
            lengths = [length for length, _ in each]
            grids = tuple(grid for _, several in each for grid in several)
            found.append(Side(float(np.mean(lengths)), float(max(lengths)), grids, len(each)))
        return found[0], found[1], negatives / len(rows)

    def _measure(
        self, record: Mapping[str, Any], members: Mapping[str, bytes], instruction: str
    ) -> tuple[int, list[tuple[int, int, int]]]:
        parts: list[Text | Image | Video] = []
        sizes = []
        for part in record["parts"]:
            if "text" in part:
                parts.append(Text(part["text"]))
            elif "image" in part:
                parts.append(Image(b""))
                sizes.append((1, *_picture_size(members[part["image"]])))
            else:
                parts.append(Video(b""))
                sizes.append(_clip_size(part, members, self._policy.sampling))
        item = Item(tuple(parts), record.get("instruction") or instruction)
        grids = [self._grid(type(part) is Video, *size) for part, size in zip(item.media, sizes, strict=True)]
        if self._builder is not None:
            return self._builder.count_tokens(item, sizes), grids
        return self._count(len(f"{item.instruction} {item.text}".split()), grids), grids

    def _assume(self, modality: str, instruction_words: int) -> Side:
        assumed, grids = self._assumed, []
        if "I" in modality:
            grids.append(self._grid(False, 1, *assumed.image[::-1]))
        if "V" in modality:
            frames = frame_indices(max(1, round(assumed.clip_s * 25)), 25.0, self._policy.sampling)
            grids.append(self._grid(True, len(frames), *assumed.frame[::-1]))
        words = instruction_words + assumed.text_words * ("T" in modality)
        length = self._count(words, grids)
        return Side(length, length, tuple(grids))

    def _count(self, words: float, grids: Sequence[tuple[int, int, int]]) -> int:
        vision = sum(self.geometry.tokens(grid) + 2 for grid in grids)
        return min(round(TEMPLATE_TOKENS + vision + TOKENS_PER_WORD * words), self._policy.max_length)

    def _grid(self, clip: bool, frames: int, height: int, width: int) -> tuple[int, int, int]:
        policy, area = self._policy, self.geometry.factor**2
        low, high = (
            (policy.min_frame_tokens, policy.max_frame_tokens)
            if clip
            else (policy.min_image_tokens, policy.max_image_tokens)
        )
        h, w = smart_size(height, width, self.geometry.factor, low * area, high * area)
        steps = frames // self.geometry.temporal_patch if clip else 1
        return steps, h // self.geometry.patch, w // self.geometry.patch


def _picture_size(data: bytes) -> tuple[int, int]:
    """(height, width) of a picture, from its header."""
    with PilImage.open(io.BytesIO(data)) as picture:
        return picture.height, picture.width


def _clip_size(part: Mapping[str, Any], members: Mapping[str, bytes], sampling: Sampling) -> tuple[int, int, int]:
    """(sampled frames, height, width) of a stored clip: an original file, or its frames."""
    if "frames" in part:
        places = part["frames"]
        count = len(frame_indices(places["num_frames"], places["native_fps"], sampling))
        return (count, *_picture_size(members[part["video"][0]]))
    info = probe(members[part["video"]], name=part["video"])
    return len(frame_indices(info.num_frames, info.native_fps, sampling)), info.height, info.width
