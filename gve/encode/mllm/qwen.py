"""Inputs of the Qwen-VL models that were published as embedders: Qwen2-VL and Qwen3-VL.

Patches are the project's own (`gve.inputs.cut`), positions are computed here and always passed: transformers and
the published code count them in different ways, and say nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers

from gve.encode.mllm.prompt import expanded, fitted, plain, user_turn
from gve.encode.mllm.recipes import Recipe, Turn
from gve.encode.mllm.settings import Settings
from gve.inputs import (
    Prepared,
    VisionGeometry,
    VisionInput,
    VisionSpan,
    collate,
    cut,
    mrope_positions,
    normalised,
    smart_size,
)
from gve.inputs.patches import PIXEL_MEAN, PIXEL_STD
from gve.items import EmbedBatch, Frames, Image, InputError, Item, Video

_HALF = (0.5, 0.5, 0.5)


class QwenReader:
    """Items to inputs of a Qwen2-VL or Qwen3-VL; it pickles, so loader workers may run it.

    Args:
        recipe: how the model was published.
        settings: frames and limits.
        tokenizer: the model's own, a fast one.
        config: of the model.

    Raises:
        InputError: the tokenizer is of another model.
    """

    def __init__(self, recipe: Recipe, settings: Settings, tokenizer: Any, config: Any) -> None:
        self.recipe, self.settings, self.tokenizer = recipe, settings, tokenizer
        vision = config.vision_config
        self.geometry = VisionGeometry(
            patch=vision.patch_size,
            merge=vision.spatial_merge_size,
            temporal_patch=vision.temporal_patch_size,
            tokens_per_second=1,  # these models count grid steps, not seconds
            image_token=config.image_token_id,
            video_token=config.video_token_id,
            vision_start=config.vision_start_token_id,
            vision_end=config.vision_end_token_id,
        )
        self.special = tuple(sorted(tokenizer.get_added_vocab(), key=len, reverse=True))
        for token, expected in (
            ("<|image_pad|>", self.geometry.image_token),
            ("<|video_pad|>", self.geometry.video_token),
        ):
            if (found := tokenizer.convert_tokens_to_ids(token)) != expected:
                raise InputError(f"the tokenizer's id of {token} is {found}, the model's config says {expected}")

    def __call__(self, item: Item) -> Prepared:
        """One decoded item's tensors.

        Raises:
            InputError: its vision tokens alone pass the limit, or a clip's frames do not pair.
        """
        pictures: list[tuple[VisionInput, str, list[VisionSpan]]] = []  # patches, placeholders, spans in their order
        kinds = []
        for part in item.media:
            pictures += self._seen(part)
            kinds.append("image" if isinstance(part, Image) else "video")
        spans = [span for _, _, own in pictures for span in own]
        counts = [self.geometry.tokens(span.grid) for span in spans]
        media = "".join(holders for _, holders, _ in pictures)
        instruction = plain(item.instruction, self.special)

        def render(text: str) -> str:
            return self.recipe.prompt(Turn(instruction, text, media, tuple(kinds), self.chat))

        room = self.settings.max_length - sum(counts) + len(counts)
        ids, cut = fitted(
            self.tokenizer, render, plain(item.text, self.special), room, f"item {item.id!r}" if item.id else "an item"
        )
        whole, places = expanded(ids, {self.geometry.image_token, self.geometry.video_token}, counts)
        images, videos = (
            tuple(vision for vision, holders, _ in pictures if ("video_pad" in holders) == clip)
            for clip in (False, True)
        )
        return Prepared(
            ids=torch.tensor(whole),
            positions=self._positions(places, spans, len(whole)),
            images=images,
            videos=videos,
            cut_tokens=cut,
        )

    def collate(self, prepared: Sequence[Prepared]) -> EmbedBatch:
        """Pads on the right and joins."""
        return collate(prepared, self.tokenizer.pad_token_id or 0)

    def states(self, model: transformers.PreTrainedModel, batch: EmbedBatch) -> torch.Tensor:
        """[B, L, D] states after the final norm. Padding stands on the right, where causal attention never looks."""
        images, videos = (
            None if levels is None else normalised(levels, batch.pixel_mean, batch.pixel_std)
            for levels in (batch.image_patches, batch.video_patches)
        )
        return model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            pixel_values=images,
            image_grid_thw=batch.image_grid,
            pixel_values_videos=videos,
            video_grid_thw=batch.video_grid,
            use_cache=False,
        ).last_hidden_state

    def _seen(self, part: Image | Video) -> list[tuple[VisionInput, str, list[VisionSpan]]]:
        """Patches of one medium, the placeholders that stand for it, and the span of each placeholder."""
        if isinstance(part, Image):
            pixels = np.asarray(part.source)[None]
            vision = self._patches(pixels, self.settings.min_image_tokens, self.settings.max_image_tokens)
            return [(vision, self.recipe.image, [VisionSpan(vision.grid)])]
        if not isinstance(part.source, Frames):
            raise InputError(f"{part.name or 'a clip'} was not decoded to frames")
        frames, steps = part.source, self.geometry.temporal_patch
        if len(frames.pixels) % steps:
            raise InputError(
                f"{part.name or 'clip'}: {len(frames.pixels)} frames; their number must be a multiple of {steps}"
            )
        vision = self._patches(frames.pixels, self.settings.min_frame_tokens, self.settings.max_frame_tokens)
        count = vision.grid[0]
        if self.recipe.family == "qwen2_vl":
            return [(vision, self.recipe.video, [VisionSpan(vision.grid, np.arange(count, dtype=np.float32))])]
        # Qwen3-VL reads each grid step's time in words: the mean of its first and last frame's, by the average rate.
        seconds = (frames.indices / frames.native_fps).reshape(count, steps)
        holders = "".join(f"<{(own[0] + own[-1]) / 2:.1f} seconds>{self.recipe.video}" for own in seconds)
        return [(vision, holders, [VisionSpan((1, *vision.grid[1:]))] * count)]

    def _patches(self, pixels: np.ndarray, least: int, most: int) -> VisionInput:
        area = self.geometry.factor**2
        height, width = smart_size(pixels.shape[1], pixels.shape[2], self.geometry.factor, least * area, most * area)
        mean, std = (_HALF, _HALF) if self.recipe.family == "qwen3_vl" else (PIXEL_MEAN, PIXEL_STD)
        levels, grid = cut(pixels, height, width, self.geometry)
        return VisionInput(levels, grid, "", mean, std)

    def _positions(self, places: Sequence[int], spans: Sequence[VisionSpan], length: int) -> torch.Tensor:
        """[3, L]: text and spans as the sequence has them, or all tokens one after another."""
        if self.recipe.positions == "sequential":
            return torch.arange(length).expand(3, -1)
        pieces: list[int | VisionSpan] = []
        done = 0
        for start, span in zip(places, spans, strict=True):
            pieces += [start - done, span]
            done = start + self.geometry.tokens(span.grid)
        return mrope_positions([*pieces, length - done], self.geometry)

    def chat(self, content: Sequence[Any]) -> str:
        """The prompt of one user turn by the model's own chat template, with the reply's opening.

        Raises:
            InputError: its files hold none.
        """
        return user_turn(self.tokenizer, content)

    def limits(self) -> dict[str, Any]:
        """The settings that decide this model's inputs."""
        return self.settings.to_dict()
