"""A Qwen2.5-VL with its LM head that answers in process, one machine and no server, free or bound to a grammar.

Inputs are built by the project's own `InputBuilder`, because the library's `generate` would compute other M-RoPE
positions than the base was trained with.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, Self

import numpy as np
import torch
import transformers
from transformers.modeling_outputs import BaseModelOutputWithPooling

from gve.encode.encoder import decoded
from gve.inputs import InputBuilder, InputPolicy, Prepared
from gve.items import Frames, InputError, Item, Text, Video
from gve.model.backbone import Backbone
from gve.synth.grammar import Course, Grammars
from gve.video.source import check_exists

FEATURE_CACHE_BYTES = 1 << 26
"""Some 2,400 clips of the toy world, some 10 of real ones: all questions about a clip share one run of the tower."""
FRAMES_CACHE_BYTES = 1 << 28
"""Decoded frames of the clips that were asked about last."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """One conversation, ready to be answered.

    Args:
        prepared: its tokens and pictures, up to where the assistant's turn begins.
        grammar: what the answer is bound to (gve.synth.grammar); empty leaves it free.
        max_tokens: where an answer that does not end is cut.
        generator: of its draws; None takes the most probable token.
    """

    prepared: Prepared
    grammar: str = ""
    max_tokens: int = 256
    generator: torch.Generator | None = None


@dataclass(frozen=True)
class Said:
    """An answer.

    Args:
        text: without the token that ends it.
        ended: False where it was cut.
        prompt_tokens, completion_tokens: read and written.
    """

    text: str
    ended: bool
    prompt_tokens: int
    completion_tokens: int


class ChatModel:
    """Answers questions about items by greedy decoding, or by sampling with a seed. Build it with `from_base`.

    Args:
        model: a Qwen2.5-VL with LM head; it is put in eval mode and frozen.
        builder: inputs by a policy that pads on the left and appends nothing.
        batch_size: items that are answered together.

    Raises:
        InputError: the builder's policy pads on the right or appends a token after the assistant's turn begins.
    """

    def __init__(
        self, model: transformers.Qwen2_5_VLForConditionalGeneration, builder: InputBuilder, *, batch_size: int = 32
    ) -> None:
        if builder.policy.append_eos or builder.policy.padding_side != "left":
            raise InputError("a captioner's inputs need append_eos false and padding_side left")
        self.backbone = Backbone(model.model, None, feature_cache_bytes=FEATURE_CACHE_BYTES).eval()
        self.lm_head = model.lm_head.requires_grad_(False)
        self.builder = builder
        self.batch_size = batch_size
        self._builders = {builder.policy.system_prompt: builder}
        self._frames: OrderedDict[str, Video] = OrderedDict()
        self._frames_room = FRAMES_CACHE_BYTES
        self._stops = set(builder.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))

    @classmethod
    def load(
        cls,
        base: str | Path,
        *,
        policy: InputPolicy,
        batch_size: int = 32,
        device: str = "cpu",
        dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> Self:
        """Loads a base with its LM head.

        Args:
            base: a hub folder or hub name.
            policy: of its inputs.
            batch_size: items that are answered together.
            device: torch device.
            dtype: of the weights.

        Raises:
            InputError: no such base, or weights are missing.
        """
        builder = InputBuilder.from_base(str(base), policy)
        return cls(_weights(str(base), dtype).to(device), builder, batch_size=batch_size)

    @cached_property
    def grammars(self) -> Grammars:
        """Grammars over this model's tokens."""
        return Grammars(self.builder.tokenizer, self.lm_head.weight.shape[0], sorted(self._stops))

    def answer(
        self,
        items: Sequence[Item],
        questions: Sequence[str],
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[str]:
        """The answer to one question about each item; it does not depend on what else is asked.

        Args:
            items: pictures, clips and texts in any mix; instructions are not read.
            questions: one for each item; it stands after the item's media and text.
            max_tokens: where an answer that does not end is cut.
            temperature: 0 takes the most probable token; above, tokens are drawn from the softmax of logits /
                temperature.
            seed: of the draws, with the item's content and the question.

        Raises:
            InputError: not one question for each item, an empty question, or values out of range.
            gve.video.MediaError: a medium cannot be decoded.
        """
        if len(items) != len(questions) or not all(questions):
            raise InputError(f"{len(questions)} questions for {len(items)} items: give one, not empty, for each")
        if max_tokens < 1 or temperature < 0:
            raise InputError(f"max_tokens {max_tokens}, temperature {temperature}: use at least 1, and 0 or more")
        asked = [
            Item((*item.parts, Text(question)), id=item.id) for item, question in zip(items, questions, strict=True)
        ]
        prompts = [
            Prompt(self.prepare(item), "", max_tokens, draws(seed, item) if temperature else None) for item in asked
        ]
        return [said.text.strip() for said in self.say(prompts, temperature)]

    def prepare(self, item: Item, system: str = "") -> Prepared:
        """The input of a user turn: its media in order, then its text.

        Args:
            item: what stands in the user turn.
            system: what stands in the system turn; the policy's own when empty.

        Raises:
            InputError: the item is empty, or too long for the policy.
            gve.video.MediaError: a medium cannot be decoded.
        """
        builder = self.builder
        if system and system not in self._builders:
            policy = builder.policy.replace(system_prompt=system)
            self._builders[system] = InputBuilder(builder.tokenizer, builder.geometry, policy)
        builder = self._builders[system] if system else builder
        parts = tuple(self._decoded(part) if isinstance(part, Video) else part for part in item.parts)
        return builder.prepare(decoded(replace(item, parts=parts), builder.policy))

    def say(self, prompts: Sequence[Prompt], temperature: float = 0.0) -> list[Said]:
        """Answers in the order of the prompts; none depends on the others."""
        answers: dict[int, Said] = {}
        by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row].prepared.ids))  # little padding
        for start in range(0, len(prompts), self.batch_size):
            rows = by_length[start : start + self.batch_size]
            told = self._decode([prompts[row] for row in rows], temperature)
            for row, (ids, ended) in zip(rows, told, strict=True):
                text = self.builder.tokenizer.decode(ids, skip_special_tokens=True)
                answers[row] = Said(text, ended, len(prompts[row].prepared.ids), len(ids))
        return [answers[row] for row in range(len(prompts))]

    def _decoded(self, part: Video) -> Video:
        """The clip with its frames, kept for the next question about it."""
        if isinstance(part.source, (Frames, np.ndarray)):
            return part
        check_exists(part.source, part.name)
        key = part.content_hash()
        if key not in self._frames:
            (clip,) = decoded(Item((part,)), self.builder.policy).parts
            assert isinstance(clip, Video)
            self._frames[key] = clip
            self._frames_room -= _size(clip)
            while self._frames_room < 0 and len(self._frames) > 1:
                self._frames_room += _size(self._frames.popitem(last=False)[1])
        self._frames.move_to_end(key)
        return self._frames[key]

    @torch.inference_mode()
    def _decode(self, prompts: Sequence[Prompt], temperature: float) -> list[tuple[list[int], bool]]:
        """Token ids of each answer without the one that ends it, and whether it ended; one batch on a cache."""
        batch = self.builder.collate([prompt.prepared for prompt in prompts])
        batch = batch.to(next(self.backbone.parameters()).device)
        features = self.backbone.media_features(batch)
        media = {
            kind: BaseModelOutputWithPooling(pooler_output=tuple(features[kind, key] for key in keys))
            for kind, keys in (("image", batch.image_keys), ("video", batch.video_keys))
            if keys
        }
        cache = transformers.DynamicCache(config=self.backbone.model.config.text_config)
        courses = [self.grammars.follow(prompt.grammar) if prompt.grammar else None for prompt in prompts]
        told: list[list[int]] = [[] for _ in prompts]
        ended = [False] * len(prompts)
        rows = list(range(len(prompts)))  # the batch: those that have not ended
        ids, mask, positions = batch.input_ids, batch.attention_mask, batch.position_ids
        while rows:
            states = self.backbone.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                mm_encoder_outputs=media,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[:, -1]
            logits = bound(self.lm_head(states).float(), [courses[row] for row in rows])
            chosen = _choose(logits, temperature, [prompts[row].generator for row in rows])
            going = []
            for place, (row, token) in enumerate(zip(rows, chosen.tolist(), strict=True)):
                if token in self._stops:
                    ended[row] = True
                    continue
                told[row].append(token)
                course = courses[row]
                if course is not None and course.take(token):
                    ended[row] = True
                elif len(told[row]) < prompts[row].max_tokens:
                    going.append(place)
            keep = torch.tensor(going, dtype=torch.int64, device=mask.device)
            if len(going) < len(rows):
                cache.batch_select_indices(keep)
            rows = [rows[place] for place in going]
            ids = chosen.to(mask.device)[keep, None]
            mask = torch.nn.functional.pad(mask[keep], (0, 1), value=1)
            positions = positions[:, keep, -1:] + 1  # text follows text: all three rows count up by one
            media = {}
        return list(zip(told, ended, strict=True))


def bound(logits: torch.Tensor, courses: Sequence[Course | None]) -> torch.Tensor:
    """[B, V] logits, at minus infinity for what the course of a row does not allow."""
    if not any(courses):
        return logits
    free = torch.ones(logits.shape[1], dtype=torch.bool)
    allowed = torch.stack([free if course is None else torch.from_numpy(course.allowed()) for course in courses])
    return logits.masked_fill(~allowed.to(logits.device), float("-inf"))


def draws(seed: int, item: Item) -> torch.Generator:
    """Draws of one item with its question, whatever else is in the batch."""
    digest = hashlib.sha256(f"{seed}\0{item.content_hash()}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _choose(logits: torch.Tensor, temperature: float, generators: Sequence[torch.Generator | None]) -> torch.Tensor:
    """[B] token ids: the most probable, or row i drawn by generator i, on the host."""
    if not temperature:
        return logits.argmax(1)
    shares = torch.softmax(logits.double() / temperature, dim=-1).cpu()
    drawn = [torch.multinomial(row, 1, generator=own) for row, own in zip(shares, generators, strict=True)]
    return torch.cat(drawn)


def _size(clip: Video) -> int:
    return clip.source.pixels.nbytes if isinstance(clip.source, Frames) else 0


def _weights(base: str, dtype: str) -> transformers.Qwen2_5_VLForConditionalGeneration:
    bar = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    try:
        model, report = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
            base, dtype=getattr(torch, dtype), attn_implementation="sdpa", output_loading_info=True
        )
    except OSError as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"the weights of base {base!r} cannot be loaded ({reason})") from None
    finally:
        if bar:
            transformers.logging.enable_progress_bar()
    missing = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if missing:
        raise InputError(f"base {base!r} lacks {len(missing)} weights, for example {missing[0]}; they would be random")
    return model
