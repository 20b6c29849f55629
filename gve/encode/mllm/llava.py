"""Inputs of the LLaVA models that were published as embedders: LLaVA-NeXT and LLaVA-OneVision.

Tiles come from transformers' PIL-backed image processors. A tile has a fixed size, so the limits on tokens of a frame
or an image do not apply; `max_length` does. An image is cut into tiles at the resolution that fits it best ("anyres").
A frame is one tile, the whole picture squeezed into it: LLaVA-OneVision pools the tiles of a clip to a quarter of their
tokens, LLaVA-NeXT knows no clips and reads its frames as images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import PIL.Image
import torch
from transformers import PreTrainedModel
from transformers.image_processing_utils import select_best_resolution
from transformers.modeling_outputs import BaseModelOutputWithPooling

from gve.encode.mllm.prompt import expanded, fitted, plain, user_turn
from gve.encode.mllm.recipes import Recipe, Turn
from gve.encode.mllm.settings import Settings
from gve.items import Frames, Image, InputError, Item, Video


@dataclass(frozen=True, eq=False)
class Tiles:
    """One image or clip.

    Args:
        kind: "image" is one picture in several tiles, "frames" several of one tile each, "clip" frames read at once.
        pixels: [n, 3, S, S] float32, normalised.
        size: (height, width) of the picture before it was cut.
    """

    kind: Literal["image", "frames", "clip"]
    pixels: torch.Tensor
    size: tuple[int, int]


@dataclass(frozen=True, eq=False)
class LlavaPrepared:
    """One item: [L] int64 ids and its pictures in order."""

    ids: torch.Tensor
    media: tuple[Tiles, ...]
    cut_tokens: int


@dataclass(frozen=True, eq=False)
class LlavaBatch:
    """B items: [B, L] int64 ids padded on the right, [B] int64 place of the pooled token, pictures in order."""

    input_ids: torch.Tensor
    pool_index: torch.Tensor
    media: tuple[Tiles, ...]

    def to(self, device: torch.device) -> LlavaBatch:
        media = tuple(replace(own, pixels=own.pixels.to(device)) for own in self.media)
        return LlavaBatch(self.input_ids.to(device), self.pool_index.to(device), media)


class LlavaReader:
    """Items to inputs of a LLaVA-NeXT or LLaVA-OneVision; it pickles, so loader workers may run it.

    Args:
        recipe: how the model was published.
        settings: frames and the limit of tokens.
        tokenizer: the model's own, a fast one.
        config: of the model.
        images: its PIL-backed image processor.
    """

    def __init__(self, recipe: Recipe, settings: Settings, tokenizer: Any, config: Any, images: Any) -> None:
        self.recipe, self.settings, self.tokenizer, self.images = recipe, settings, tokenizer, images
        self.placeholders = {config.image_token_id, getattr(config, "video_token_id", config.image_token_id)}
        self.pinpoints: list[list[int]] = [list(point) for point in config.image_grid_pinpoints]
        self.tile_px: int = config.vision_config.image_size
        self.side: int = self.tile_px // config.vision_config.patch_size  # patches along one side of a tile
        self.most_tiles = 0
        if recipe.family == "llava_onevision":
            self.most_tiles = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
        self.special = tuple(sorted(tokenizer.get_added_vocab(), key=len, reverse=True))

    def __call__(self, item: Item) -> LlavaPrepared:
        """One decoded item's tensors.

        Raises:
            InputError: its vision tokens alone pass the limit.
        """
        seen = [self._seen(part) for part in item.media]
        kinds = tuple("image" if isinstance(part, Image) else "video" for part in item.media)
        counts = [count for tiles in seen for count in self._counts(tiles)]
        media = "".join(
            self.recipe.image * len(self._counts(tiles)) if tiles.kind != "clip" else self.recipe.video
            for tiles in seen
        )
        instruction = plain(item.instruction, self.special)

        def render(text: str) -> str:
            return self.recipe.prompt(Turn(instruction, text, media, kinds, self.chat))

        room = self.settings.max_length - sum(counts) + len(counts)
        ids, cut = fitted(
            self.tokenizer, render, plain(item.text, self.special), room, f"item {item.id!r}" if item.id else "an item"
        )
        ids, _ = expanded(ids, self.placeholders, counts)
        return LlavaPrepared(torch.tensor(ids), tuple(seen), cut)

    def collate(self, prepared: Sequence[LlavaPrepared]) -> LlavaBatch:
        """Pads on the right and joins."""
        ids = torch.nn.utils.rnn.pad_sequence(
            [own.ids for own in prepared], batch_first=True, padding_value=self.tokenizer.pad_token_id or 0
        )
        ends = torch.tensor([len(own.ids) - 1 for own in prepared])
        return LlavaBatch(ids, ends, tuple(tiles for own in prepared for tiles in own.media))

    def states(self, model: PreTrainedModel, batch: LlavaBatch) -> torch.Tensor:
        """[B, L, D] states after the final norm. Padding stands on the right, where causal attention never looks."""
        images: list[torch.Tensor] = []
        clips: list[torch.Tensor] = []
        for tiles in batch.media:
            pixels = tiles.pixels.to(model.dtype)
            if tiles.kind == "image":
                sizes = torch.tensor([tiles.size])
                images += model.get_image_features(pixels[None], sizes, return_dict=True).pooler_output
            elif tiles.kind == "frames":
                images += self._one_tile_each(model, pixels)
            else:
                clips.append(model.get_video_features(pixels[None], return_dict=True).pooler_output[0])
        outputs = {}
        if images:
            outputs["image"] = BaseModelOutputWithPooling(pooler_output=images)
        if clips:
            outputs["video"] = BaseModelOutputWithPooling(pooler_output=torch.cat(clips)[None])
        return model(input_ids=batch.input_ids, mm_encoder_outputs=outputs, use_cache=False).last_hidden_state

    def _seen(self, part: Image | Video) -> Tiles:
        if isinstance(part, Image):
            picture = PIL.Image.fromarray(np.asarray(part.source))
            if self.recipe.image_px:
                picture = picture.resize((self.recipe.image_px, self.recipe.image_px))
            return Tiles("image", self._tiles([picture], self.pinpoints)[0], (picture.height, picture.width))
        if not isinstance(part.source, Frames):
            raise InputError(f"{part.name or 'a clip'} was not decoded to frames")
        frames = part.source.pixels
        whole = self._tiles([PIL.Image.fromarray(frame) for frame in frames], [[self.tile_px, self.tile_px]])[:, 0]
        kind: Literal["frames", "clip"] = "frames" if self.recipe.clips == "images" else "clip"
        return Tiles(kind, whole, frames.shape[1:3])

    def _tiles(self, pictures: Sequence[PIL.Image.Image], pinpoints: list[list[int]]) -> torch.Tensor:
        """[pictures, n, 3, S, S]: the whole picture in one tile, then its cuts."""
        return self.images(list(pictures), image_grid_pinpoints=pinpoints, return_tensors="pt")["pixel_values"]

    def _counts(self, tiles: Tiles) -> list[int]:
        """Tokens behind each placeholder of one picture or clip."""
        if tiles.kind == "frames":
            return [self.side**2 + 1] * len(tiles.pixels)
        if tiles.kind == "clip":
            return [len(tiles.pixels) * math.ceil(self.side / 2) ** 2 + 1]
        return [self._anyres(*tiles.size)]

    def _anyres(self, height: int, width: int) -> int:
        """Tokens of a picture at the resolution that fits it: the whole in one tile, its cuts, a line break each row.

        The rows and columns that only pad the picture to that resolution are left out; LLaVA-OneVision shrinks what is
        larger than `most_tiles` tiles (transformers, processing_llava_next.py and processing_llava_onevision.py).
        """
        best = select_best_resolution([height, width], self.pinpoints)
        rows, columns = (self.side * (edge // self.tile_px) for edge in best)
        if width / height > columns / rows:
            rows -= (rows - int(round(height * (columns / width), 7))) // 2 * 2
        else:
            columns -= (columns - int(round(width * (rows / height), 7))) // 2 * 2
        if self.most_tiles and (ratio := math.sqrt(rows * columns / (self.most_tiles * self.side**2))) > 1.1:
            rows, columns = int(rows // ratio), int(columns // ratio)
        return self.side**2 + rows * columns + rows

    def _one_tile_each(self, model: Any, pixels: torch.Tensor) -> list[torch.Tensor]:
        """[tokens, D] of each tile with its line break: what the model makes of a picture without cuts."""
        config = model.config
        layers = model.vision_tower(pixels, output_hidden_states=True).hidden_states
        chosen = config.vision_feature_layer
        states = layers[chosen] if isinstance(chosen, int) else torch.cat([layers[own] for own in chosen], dim=-1)
        if config.vision_feature_select_strategy == "default":
            states = states[:, 1:]
        return [torch.cat((own, model.image_newline[None])) for own in model.multi_modal_projector(states)]

    def chat(self, content: Sequence[Any]) -> str:
        """The prompt of one user turn by the model's own chat template, with the reply's opening.

        Raises:
            InputError: its files hold none.
        """
        return user_turn(self.tokenizer, content)

    def limits(self) -> dict[str, Any]:
        """The settings that decide this model's inputs."""
        return {"sampling": str(self.settings.sampling), "max_length": self.settings.max_length}
