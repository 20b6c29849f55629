"""The one renderer: Items -> prompt, token ids, vision inputs and positions -> EmbedBatch."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

from gve import video
from gve.inputs.patches import PIXEL_MEAN, PIXEL_STD, VisionInput, cut, smart_size
from gve.inputs.policy import InputPolicy, PaddingSide, VisionGeometry
from gve.inputs.positions import VisionSpan, grid_times, mrope_positions
from gve.items import EmbedBatch, Frames, Image, InputError, Item, Video

# 4.52's value on padding; nothing attends to it, any other would do.
PAD_POSITION = 1
SPECIAL_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


@dataclass(frozen=True, eq=False)
class Prepared:
    """The unpadded tensors of one item.

    Args:
        ids: [L] int64 token ids.
        positions: [3, L] int64 M-RoPE positions.
        images, videos: vision inputs in order of appearance.
        content_id: first 8 bytes of the item's content hash, as a signed integer.
        valid: False for the stand-in of an item that could not be read.
        reason: why it could not be read.
        cut_tokens: text tokens lost at the end to fit `max_length`.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    images: tuple[VisionInput, ...] = ()
    videos: tuple[VisionInput, ...] = ()
    content_id: int = 0
    valid: bool = True
    reason: str = ""
    cut_tokens: int = 0


class InputBuilder:
    """Builds model inputs by one policy; runs in loader workers (picklable) and holds no state between items.

    Args:
        tokenizer: a fast tokenizer of the Qwen family.
        geometry: of the base model.
        policy: what the user chose.

    Raises:
        InputError: the tokenizer lacks a special token, or gives it another id than the model's config.
    """

    def __init__(self, tokenizer: Any, geometry: VisionGeometry, policy: InputPolicy) -> None:
        self.tokenizer = tokenizer
        self.geometry = geometry
        self.policy = policy
        self._settings = _pixel_settings(policy, geometry)
        ids = dict(zip(SPECIAL_TOKENS, tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)), strict=True))
        for name, expected in (
            ("<|image_pad|>", geometry.image_token),
            ("<|video_pad|>", geometry.video_token),
            ("<|vision_start|>", geometry.vision_start),
            ("<|vision_end|>", geometry.vision_end),
        ):
            if ids[name] != expected:
                raise InputError(f"the tokenizer's id of {name} is {ids[name]}, the model's config says {expected}")
        if missing := [name for name in SPECIAL_TOKENS if ids[name] in (None, tokenizer.unk_token_id)]:
            raise InputError(f"the tokenizer has no {', '.join(missing)}; use a tokenizer of the Qwen2.5-VL family")
        start, end, self._pad = ids["<|im_start|>"], ids["<|im_end|>"], ids["<|endoftext|>"]
        # Special tokens split the text before the merges, so the turns may be tokenised apart, once.
        newline = self._encode("\n")
        self._head = [start, *self._encode(f"system\n{policy.system_prompt}"), end, *newline, start]
        self._user = self._encode("user\n")
        self._tail = [end, *newline, start, *self._encode("assistant\n")] + [self._pad] * policy.append_eos

    @classmethod
    def from_base(cls, base: str, policy: InputPolicy) -> InputBuilder:
        """The builder for a base model.

        Args:
            base: a local folder or a hub name with config.json and the tokenizer's files.
            policy: what the user chose.

        Raises:
            InputError: the files cannot be found or are not those of a Qwen2.5-VL model.
        """
        if not Path(base).exists() and (base.startswith(("/", ".")) or base.count("/") > 1):
            raise InputError(
                f"base {base!r} does not exist: give a folder, or a hub name like Qwen/Qwen2.5-VL-3B-Instruct"
            )
        from transformers import AutoTokenizer
        from transformers.utils import cached_file

        try:
            config = cached_file(base, "config.json")
            tokenizer = AutoTokenizer.from_pretrained(base)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"cannot load the tokenizer and config of base {base!r}: {reason}") from error
        return cls(tokenizer, VisionGeometry.from_config(Path(str(config))), policy)

    def prepare(self, item: Item) -> Prepared:
        """One item's tensors; media files are decoded in this process.

        The user turn is: media in order, then instruction and text with one space between. Text follows all media,
        wherever its parts stand.

        Raises:
            InputError: the item is empty, or its vision tokens and the template alone exceed `max_length`.
            gve.video.MediaError: a medium cannot be decoded.
        """
        seen = [self._see(part) for part in item.media]
        ids, spans, cut = self._prompt(item, [span for _, span in seen])
        images, videos = (
            tuple(vision for (vision, _), part in zip(seen, item.media, strict=True) if isinstance(part, kind))
            for kind in (Image, Video)
        )
        for token, visions in ((self.geometry.image_token, images), (self.geometry.video_token, videos)):
            holders, features = ids.count(token), sum(self.geometry.tokens(v.grid) for v in visions)
            if holders != features:
                raise InputError(f"item {item.id!r}: {holders} placeholders of id {token} for {features} features")
        return Prepared(
            ids=torch.tensor(ids, dtype=torch.int64),
            positions=mrope_positions(spans, self.geometry, self.policy.positions),
            images=images,
            videos=videos,
            content_id=_content_id(item),
            cut_tokens=cut,
        )

    def placeholder(self, reason: str = "") -> Prepared:
        """The stand-in for an item that could not be read: an empty text with `valid` False, so shapes stay."""
        ids = torch.tensor(self._head + self._user + self._tail, dtype=torch.int64)
        positions = mrope_positions([len(ids)], self.geometry, self.policy.positions)
        return Prepared(ids=ids, positions=positions, content_id=_content_id(Item(())), valid=False, reason=reason)

    def count_tokens(self, item: Item, sizes: Sequence[tuple[int, int, int]] | None = None) -> int:
        """Length of the item's input: what `prepare` would give, without reading pixels where sizes are given.

        Args:
            item: the item.
            sizes: (frames, height, width) of each image (1 frame) and clip in order, in pixels of the source; when
                None they are taken from decoded sources, and files are opened.

        Raises:
            InputError: as `prepare`, or another number of sizes than media.
        """
        if sizes is None:
            sizes = [self._size(part) for part in item.media]
        if len(sizes) != len(item.media):
            raise InputError(f"item {item.id!r}: {len(sizes)} sizes for {len(item.media)} images and clips")
        spans = []
        for part, (frames, height, width) in zip(item.media, sizes, strict=True):
            h, w = self._target_size(part, height, width)
            patch, steps = self.geometry.patch, self.geometry.temporal_patch
            spans.append((part, (1 if isinstance(part, Image) else frames // steps, h // patch, w // patch)))
        return len(self._prompt(item, [VisionSpan(grid) for _, grid in spans])[0])

    def collate(self, prepared: Sequence[Prepared]) -> EmbedBatch:
        """Pads to the longest and joins.

        Raises:
            InputError: nothing to join.
        """
        return collate(prepared, self._pad, self.policy.padding_side)

    def __call__(self, items: Sequence[Item]) -> EmbedBatch:
        """A batch of items; an unreadable one raises (see `prepare`)."""
        return self.collate([self.prepare(item) for item in items])

    def _encode(self, text: str) -> list[int]:
        # The Rust tokenizer itself: transformers' call around it costs as much again. Its last caller's settings stay.
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        # "<|im_end|>" written by a user becomes ordinary tokens and cannot end the turn.
        backend.encode_special_tokens = True
        return backend.encode(text, add_special_tokens=False).ids

    def _prompt(self, item: Item, visions: Sequence[VisionSpan]) -> tuple[list[int], list[int | VisionSpan], int]:
        """(token ids, the same as spans for positions, text tokens cut) of an item whose media have these spans."""
        text = f"{item.instruction} {item.text}" if item.instruction and item.text else item.instruction or item.text
        if not text and not visions:
            raise InputError(f"item {item.id!r} is empty: it has neither text nor media")
        ids = list(self._head)
        spans: list[int | VisionSpan] = []
        if visions:
            ids += self._user
            body = self._encode(text or self.policy.target_text)
            done = 0
            for part, vision in zip(item.media, visions, strict=True):
                holder = self.geometry.image_token if isinstance(part, Image) else self.geometry.video_token
                count = self.geometry.tokens(vision.grid)
                spans += [len(ids) + 1 - done, vision]
                ids += [self.geometry.vision_start, *[holder] * count, self.geometry.vision_end]
                done = len(ids) - 1
        else:
            # Merges may cross from the role's newline into a text that begins with white space.
            body, done = self._encode(f"user\n{text}"), 0
        room = self.policy.max_length - len(ids) - len(self._tail)
        least = 0 if visions else len(self._user)
        if room < least:
            raise InputError(
                f"item {item.id!r}: {sum(self.geometry.tokens(v.grid) for v in visions)} vision tokens and the "
                f"template need {len(ids) + len(self._tail) + least} tokens, max_length is {self.policy.max_length}; "
                "raise max_length, or lower frames or tokens per frame"
            )
        ids += body[:room] + self._tail
        spans.append(len(ids) - done)
        return ids, spans, max(len(body) - room, 0)

    def _see(self, part: Image | Video) -> tuple[VisionInput, VisionSpan]:
        """Decodes, resizes and cuts one medium."""
        steps = self.geometry.temporal_patch
        if isinstance(part, Image):
            pixels = self._picture(part)[None]
            times = None
        else:
            frames = self._frames(part)
            pixels = frames.pixels
            if len(pixels) % steps or not len(pixels):
                raise InputError(
                    f"{part.name or 'clip'}: {len(pixels)} frames; their number must be a multiple of {steps}"
                )
            times = grid_times(frames, steps, self.policy.times)
        height, width = self._target_size(part, pixels.shape[1], pixels.shape[2])
        levels, grid = cut(pixels, height, width, self.geometry)
        return VisionInput(levels, grid, f"{part.content_hash()}:{self._settings[type(part)]}"), VisionSpan(grid, times)

    def _picture(self, part: Image) -> np.ndarray:
        if isinstance(part.source, Frames):
            raise InputError(f"{part.name or 'image'}: frames given as an image; use Video, or one frame's pixels")
        return video.decode_image(part.source, name=part.name)

    def _frames(self, part: Video) -> Frames:
        if isinstance(part.source, Frames):
            return part.source
        return video.decode(_file(part), self.policy.sampling, name=part.name, span_s=part.span_s)

    def _size(self, part: Image | Video) -> tuple[int, int, int]:
        """(frames, height, width) of a medium before the resize."""
        if isinstance(part, Image):
            height, width = self._picture(part).shape[:2]
            return 1, height, width
        if isinstance(part.source, Frames):
            count, height, width = part.source.pixels.shape[:3]
            return count, height, width
        info = video.probe(_file(part), name=part.name)
        count = len(video.frame_indices(info.num_frames, info.native_fps, self.policy.sampling))
        return count, info.height, info.width

    def _target_size(self, part: Image | Video, height: int, width: int) -> tuple[int, int]:
        policy, area = self.policy, self.geometry.factor**2
        low, high = (
            (policy.min_image_tokens, policy.max_image_tokens)
            if isinstance(part, Image)
            else (policy.min_frame_tokens, policy.max_frame_tokens)
        )
        return smart_size(height, width, self.geometry.factor, low * area, high * area)


def collate(prepared: Sequence[Prepared], pad_token: int, padding_side: PaddingSide = "right") -> EmbedBatch:
    """Pads to the longest and joins.

    Args:
        prepared: items of one model.
        pad_token: id that fills up.
        padding_side: where it stands.

    Raises:
        InputError: nothing to join, or pictures of models that scale colours in different ways.
    """
    if not prepared:
        raise InputError("a batch needs at least one item")
    lengths = torch.tensor([len(p.ids) for p in prepared])
    rows, longest = len(prepared), int(lengths.max())
    left = padding_side == "left"
    ids = torch.full((rows, longest), pad_token)
    mask = torch.zeros(rows, longest, dtype=torch.int64)
    positions = torch.full((3, rows, longest), PAD_POSITION)
    for row, one in enumerate(prepared):
        place = slice(longest - len(one.ids), longest) if left else slice(0, len(one.ids))
        ids[row, place] = one.ids
        mask[row, place] = 1
        positions[:, row, place] = one.positions
    images = [vision for one in prepared for vision in one.images]
    videos = [vision for one in prepared for vision in one.videos]
    colours = {(vision.pixel_mean, vision.pixel_std) for vision in (*images, *videos)}
    if len(colours) > 1:
        raise InputError("pictures of one batch must be of one model: their colours are scaled in different ways")
    mean, std = next(iter(colours), (PIXEL_MEAN, PIXEL_STD))
    return EmbedBatch(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        pool_index=torch.full((rows,), longest - 1) if left else lengths - 1,
        content_ids=torch.tensor([one.content_id for one in prepared], dtype=torch.int64),
        valid=torch.tensor([one.valid for one in prepared]),
        image_patches=_joined(images),
        image_grid=torch.tensor([vision.grid for vision in images]) if images else None,
        image_keys=tuple(vision.key for vision in images),
        image_rows=tuple(row for row, one in enumerate(prepared) for _ in one.images),
        video_patches=_joined(videos),
        video_grid=torch.tensor([vision.grid for vision in videos]) if videos else None,
        video_keys=tuple(vision.key for vision in videos),
        video_rows=tuple(row for row, one in enumerate(prepared) for _ in one.videos),
        pixel_mean=mean,
        pixel_std=std,
    )


def _joined(visions: Sequence[VisionInput]) -> torch.Tensor | None:
    """Patches of all of them in one tensor of bytes.

    In a loader's worker it lies in shared memory from the start, as with torch's own collation: it is by far the
    largest thing that the training process gets, and would else be copied into shared memory when it is sent.
    """
    if not visions:
        return None
    shape = (sum(len(vision.levels) for vision in visions), visions[0].levels.shape[1])
    if get_worker_info() is None:
        whole = torch.empty(shape, dtype=torch.uint8)
    else:
        shared = torch.UntypedStorage._new_shared(math.prod(shape), device="cpu")
        whole = torch.empty(0, dtype=torch.uint8).set_(shared, 0, shape)  # type: ignore[call-overload]
    return torch.cat([vision.levels for vision in visions], out=whole)


def _file(part: Video) -> str | Path | bytes:
    if isinstance(part.source, (np.ndarray, Frames)):
        raise InputError(f"{part.name or 'clip'}: a clip of bare pixels has no times; wrap it in Frames")
    return part.source


def _pixel_settings(policy: InputPolicy, geometry: VisionGeometry) -> dict[type, str]:
    """For images and for clips: a name of everything but the content that decides the patches."""
    grid = [geometry.patch, geometry.merge, geometry.temporal_patch]
    settings: dict[type, list[Any]] = {
        Image: [*grid, policy.min_image_tokens, policy.max_image_tokens],
        Video: [*grid, policy.min_frame_tokens, policy.max_frame_tokens, policy.to_dict()["sampling"]],
    }
    return {
        kind: hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
        for kind, values in settings.items()
    }


def _content_id(item: Item) -> int:
    return int.from_bytes(bytes.fromhex(item.content_hash()[:16]), "big", signed=True)
