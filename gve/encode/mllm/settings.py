"""What a user may choose of a model's inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gve.inputs import InputPolicy
from gve.items import InputError
from gve.video import Sampling


@dataclass(frozen=True)
class Settings:
    """Frames and limits; the fields mean what they mean in `InputPolicy`.

    Args:
        sampling: frames of a clip.
        min_frame_tokens, max_frame_tokens: vision tokens of one frame before two are merged into one grid step.
        min_image_tokens, max_image_tokens: vision tokens of one image.
        max_length: tokens of one input; longer texts lose their end.
    """

    sampling: Sampling = field(default_factory=lambda: Sampling.uniform(8))
    min_frame_tokens: int = 4
    max_frame_tokens: int = 200
    min_image_tokens: int = 4
    max_image_tokens: int = 200
    max_length: int = 8192

    def changed(self, inputs: InputPolicy | Mapping[str, Any] | None) -> Settings:
        """These settings with a caller's changes; a lower limit above the new upper one comes down with it.

        Raises:
            InputError: a change that the model has no setting for, or one out of range.
        """
        names = [own.name for own in dataclasses.fields(self)]
        if isinstance(inputs, InputPolicy):
            inputs = {name: getattr(inputs, name) for name in names}
        changes = dict(inputs or {})
        if unknown := sorted(set(changes) - set(names)):
            raise InputError(f"inputs.{unknown[0]}: this model has no such setting; it has {', '.join(names)}")
        for kind in ("frame", "image"):
            low, high = f"min_{kind}_tokens", f"max_{kind}_tokens"
            changes[low] = min(changes.get(low, getattr(self, low)), changes.get(high, getattr(self, high)))
            if changes[low] < 1:
                raise InputError(f"inputs.{high}={changes.get(high, changes[low])} must be at least 1")
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**dataclasses.asdict(self), "sampling": str(self.sampling)}
