"""The embedded captioner: the tiny base with its LM head, asked about pictures and clips.

It sees pixels and errs, as a large captioner does; `claims` says how often.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gve.inputs import InputPolicy
from gve.items import InputError, Item
from gve.synth.chat import ChatModel
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


class Captioner(ChatModel):
    """Answers questions about items, and captions of the kinds that the base was taught. Build it with `from_base`."""

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
        return cls.load(folder or EMBEDDED, policy=policy, batch_size=batch_size)

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
