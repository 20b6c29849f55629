"""The embedded captioner: the tiny base with its LM head, asked about pictures and clips.

It sees pixels and errs, as a large captioner does; `claims` says how often. Inputs are built by the project's own
`InputBuilder`, because the library's `generate` would compute other M-RoPE positions than the base was trained with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.modeling_outputs import BaseModelOutputWithPooling

from gve.encode.encoder import decoded
from gve.inputs import InputBuilder, InputPolicy, Prepared
from gve.items import InputError, Item, Text
from gve.model.backbone import Backbone
from gve.toy.base import EMBEDDED, check_embedded
from gve.toy.lessons import REQUESTS
from gve.toy.scenes import SAMPLED_FRAMES
from gve.video import Sampling

# What the base was trained with: 8 frames of 3 x 3 tokens, and the answer right after the assistant's turn begins.
POLICY = InputPolicy(
    sampling=Sampling.uniform(len(SAMPLED_FRAMES)),
    max_frame_tokens=9,
    max_image_tokens=9,
    append_eos=False,
    padding_side="left",
)
FEATURE_CACHE_BYTES = 1 << 26  # some 2,400 clips of the toy world: all kinds of captions of a clip share one tower run


class Captioner:
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
        tokenizer = builder.tokenizer
        self._stops = set(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))

    @classmethod
    def from_base(
        cls, folder: str | Path | None = None, *, policy: InputPolicy = POLICY, batch_size: int = 32
    ) -> Captioner:
        """Loads a base with its LM head, in float32.

        Args:
            folder: a hub folder or hub name; None for the embedded base.
            policy: of its inputs; the default is what the embedded base was trained with.
            batch_size: items that are answered together.

        Raises:
            InputError: no such base, weights are missing, or the embedded files are damaged.
        """
        if folder is None:
            check_embedded()
        base = str(folder or EMBEDDED)
        builder = InputBuilder.from_base(base, policy)
        return cls(_load(base), builder, batch_size=batch_size)

    def caption(self, items: Sequence[Item], kind: str | None = None, **decoding: Any) -> list[str]:
        """A caption of each item.

        Args:
            items: pictures and clips.
            kind: of the captions, a key of `lessons.REQUESTS`; None for "detailed" of clips and "static" of pictures.
            decoding: as for `answer`.

        Raises:
            InputError: an unknown kind.
        """
        if kind is not None and kind not in REQUESTS:
            raise InputError(f"caption kind {kind!r} is unknown; kinds: {', '.join(REQUESTS)}")
        requests = [REQUESTS[kind or ("detailed" if "V" in item.modality else "static")] for item in items]
        return self.answer(items, requests, **decoding)

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
        ready = [self.builder.prepare(decoded(item, self.builder.policy)) for item in asked]
        generators = [_generator(seed, item) for item in asked] if temperature else None
        answers = [""] * len(items)
        by_length = sorted(range(len(items)), key=lambda row: len(ready[row].ids))  # little padding in a batch
        for start in range(0, len(items), self.batch_size):
            rows = by_length[start : start + self.batch_size]
            own = [generators[row] for row in rows] if generators else None
            told = self._decode([ready[row] for row in rows], max_tokens, temperature, own)
            for row, ids in zip(rows, told, strict=True):
                answers[row] = self.builder.tokenizer.decode(ids, skip_special_tokens=True).strip()
        return answers

    @torch.inference_mode()
    def _decode(
        self,
        prepared: Sequence[Prepared],
        max_tokens: int,
        temperature: float,
        generators: Sequence[torch.Generator] | None,
    ) -> list[list[int]]:
        """Token ids of each answer without the one that ends it; one batch on cached keys and values."""
        batch = self.builder.collate(prepared).to(next(self.backbone.parameters()).device)
        features = self.backbone.media_features(batch)
        media = {
            kind: BaseModelOutputWithPooling(pooler_output=tuple(features[kind, key] for key in keys))
            for kind, keys in (("image", batch.image_keys), ("video", batch.video_keys))
            if keys
        }
        cache = transformers.DynamicCache(config=self.backbone.model.config.text_config)
        told: list[list[int]] = [[] for _ in prepared]
        rows = list(range(len(prepared)))  # the batch: those that have not ended
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
            logits = self.lm_head(states).float()
            chosen = _sample(logits, temperature, [generators[row] for row in rows]) if generators else logits.argmax(1)
            going = []
            for place, (row, token) in enumerate(zip(rows, chosen.tolist(), strict=True)):
                if token not in self._stops:
                    told[row].append(token)
                    if len(told[row]) < max_tokens:
                        going.append(place)
            keep = torch.tensor(going, dtype=torch.int64, device=mask.device)
            if len(going) < len(rows):
                cache.batch_select_indices(keep)
            rows = [rows[place] for place in going]
            ids = chosen.to(mask.device)[keep, None]
            mask = torch.nn.functional.pad(mask[keep], (0, 1), value=1)
            positions = positions[:, keep, -1:] + 1  # text follows text: all three rows count up by one
            media = {}
        return told


def _sample(logits: torch.Tensor, temperature: float, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """[B] token ids, row i drawn by generator i, on the host."""
    shares = torch.softmax(logits.double() / temperature, dim=-1).cpu()
    drawn = [torch.multinomial(row, 1, generator=own) for row, own in zip(shares, generators, strict=True)]
    return torch.cat(drawn)


def _generator(seed: int, item: Item) -> torch.Generator:
    """Draws of one item and question, whatever else is in the batch."""
    digest = hashlib.sha256(f"{seed}\0{item.content_hash()}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _load(base: str) -> transformers.Qwen2_5_VLForConditionalGeneration:
    bar = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    try:
        model, report = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
            base, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
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
