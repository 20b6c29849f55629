"""The two records every input is built from: what the user chooses, and what the base model fixes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from gve.items import InputError
from gve.video import Sampling

PositionsRule = Literal["released", "transformers5"]
TimesRule = Literal["released", "whole_seconds", "timestamps"]
PaddingSide = Literal["right", "left"]


@dataclass(frozen=True)
class InputPolicy:
    """Everything that decides what the model reads, in plain values; stored with checkpoints, vectors and exports.

    Two runs with equal policies feed equal tensors for equal items; vectors of different policies do not compare.

    Args:
        sampling: which frames of a clip are read. The paper trains at 1 frame a second, at most 8, and evaluates with
            exactly 8.
        max_frame_tokens: upper limit of vision tokens for one frame, before two frames are merged into one grid step:
            8 frames of 200 tokens are at most 800 tokens in the language model.
        min_frame_tokens: lower limit; smaller frames are enlarged. (qwen-vl-utils uses 128 for clips.)
        max_image_tokens: upper limit of tokens for one image.
        min_image_tokens: lower limit.
        max_length: tokens of one input with template, vision and pooled token; longer texts lose their end. The paper:
            1200 in training, 8192 in evaluation.
        system_prompt: content of the system turn.
        target_text: user text of items that hold media only, with neither text nor instruction; empty for none.
        append_eos: append `<|endoftext|>`, which is then the pooled token, as in the released checkpoints.
        positions: where text after vision continues. "released": largest M-RoPE position so far + 1 (transformers
            4.49 to 4.57, vLLM). "transformers5": first vision position + max(height, width) of the merged grid.
        times: seconds between grid steps in M-RoPE. "released": 2 / sampled_fps, fractions kept (transformers 4.49 to
            4.51, vLLM). "whole_seconds": the same cut to whole seconds (transformers 4.52 to 4.57). "timestamps": the
            frames' own times, exact on files with a variable rate.
        padding_side: side of the pad tokens in a batch; the embeddings do not depend on it.

    Raises:
        InputError: a value is out of its range.
    """

    sampling: Sampling = field(default_factory=lambda: Sampling.every(1.0, 8))
    max_frame_tokens: int = 200
    min_frame_tokens: int = 4
    max_image_tokens: int = 200
    min_image_tokens: int = 4
    max_length: int = 1200
    system_prompt: str = "You are a helpful assistant."
    target_text: str = ""
    append_eos: bool = True
    positions: PositionsRule = "released"
    times: TimesRule = "released"
    padding_side: PaddingSide = "right"

    def __post_init__(self) -> None:
        for low, high in (("min_frame_tokens", "max_frame_tokens"), ("min_image_tokens", "max_image_tokens")):
            if not 1 <= getattr(self, low) <= getattr(self, high):
                raise InputError(
                    f"inputs.{low}={getattr(self, low)} must be at least 1 and at most {high}={getattr(self, high)}"
                )
        if self.max_length < 1:
            raise InputError(f"inputs.max_length={self.max_length} must be at least 1")
        for name, allowed in (("positions", PositionsRule), ("times", TimesRule), ("padding_side", PaddingSide)):
            if getattr(self, name) not in get_args(allowed):
                raise InputError(f"inputs.{name}={getattr(self, name)!r} must be one of {', '.join(get_args(allowed))}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, safe for JSON, YAML and `torch.load(weights_only=True)`."""
        values = dataclasses.asdict(self)
        values["sampling"]["fps"] = float(self.sampling.fps)  # 1 and 1.0 are one policy, so one digest
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> InputPolicy:
        """The policy of `to_dict`; a missing key takes its default.

        Raises:
            InputError: an unknown key (it would be ignored in silence) or a value out of range.
        """
        values = dict(values)
        _refuse_unknown(cls, values, "inputs")
        sampling = values.get("sampling")
        if isinstance(sampling, dict):
            _refuse_unknown(Sampling, sampling, "inputs.sampling")
            values["sampling"] = Sampling(**sampling)
        return cls(**values)

    def digest(self) -> str:
        """16 hex digits that name the policy: the start of SHA-256 over its canonical JSON."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def replace(self, **changes: Any) -> InputPolicy:
        """A copy with other values.

        Raises:
            InputError: an unknown key or a value out of range.
        """
        _refuse_unknown(type(self), changes, "inputs")
        return dataclasses.replace(self, **changes)


def _refuse_unknown(record: type, values: dict[str, Any], where: str) -> None:
    known = [f.name for f in dataclasses.fields(record)]
    for name in values:
        if name not in known:
            raise InputError(f"unknown key {where}.{name}; known keys: {', '.join(known)}")


@dataclass(frozen=True)
class VisionGeometry:
    """What the base model fixes: its grid of patches and the ids of its vision tokens.

    Args:
        patch: side of a patch, in pixels.
        merge: patches merged into one token, along height and along width.
        temporal_patch: frames in one grid step.
        tokens_per_second: M-RoPE positions in one second of video.
        image_token, video_token: ids of the placeholders, one for each merged vision token.
        vision_start, vision_end: ids around the placeholders of one image or clip.
    """

    patch: int = 14
    merge: int = 2
    temporal_patch: int = 2
    tokens_per_second: float = 2
    image_token: int = 151655
    video_token: int = 151656
    vision_start: int = 151652
    vision_end: int = 151653

    @property
    def factor(self) -> int:
        """Side of the square of pixels behind one token; frame sizes are multiples of it."""
        return self.patch * self.merge

    def tokens(self, grid: tuple[int, int, int]) -> int:
        """Tokens in the language model for a grid (t, h, w) in patches."""
        return grid[0] * grid[1] * grid[2] // self.merge**2

    @classmethod
    def from_config(cls, config: dict[str, Any] | str | Path) -> VisionGeometry:
        """The geometry in the config.json of a Qwen2.5-VL model.

        Args:
            config: its content, its path, or the folder that holds it.

        Raises:
            InputError: no such file, or not the config of a Qwen2.5-VL model.
        """
        values = config if isinstance(config, dict) else _read_json(Path(config))
        try:
            vision = values["vision_config"]
            return cls(
                patch=vision["patch_size"],
                merge=vision["spatial_merge_size"],
                temporal_patch=vision["temporal_patch_size"],
                tokens_per_second=vision["tokens_per_second"],
                image_token=values["image_token_id"],
                video_token=values["video_token_id"],
                vision_start=values["vision_start_token_id"],
                vision_end=values["vision_end_token_id"],
            )
        except KeyError as error:
            raise InputError(
                f"not the config of a Qwen2.5-VL model (model_type {values.get('model_type')!r}): it has no {error}"
            ) from error


def _read_json(path: Path) -> dict[str, Any]:
    path = path / "config.json" if path.is_dir() else path
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the model's config {path}: {error}") from error
