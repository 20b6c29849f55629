"""Opens an encoder by name: a base model as it is, or a checkpoint of `gve fit` on its base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch

from gve.encode.encoder import BackboneEncoder
from gve.inputs import InputBuilder, InputPolicy
from gve.items import InputError
from gve.model.backbone import Backbone, Lora


def load_encoder(
    name: str,
    *,
    base: str = "",
    inputs: InputPolicy | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    attention: str = "sdpa",
    device: str = "cpu",
    batch_tokens: int = 16384,
    num_workers: int = 0,
) -> BackboneEncoder:
    """An encoder in eval mode.

    Args:
        name: a file is a checkpoint of `gve fit`; anything else a base model: hub name or local folder.
        base: where a checkpoint's base lies now; the place it was trained from when empty.
        inputs: the input policy; None takes the checkpoint's own, for a base the default one.
        dtype: of the base; adapters are always float32.
        attention: kernel: "sdpa", "eager" or "flash_attention_2".
        device: torch device.
        batch_tokens: most tokens of one forward pass, padding included.
        num_workers: loader processes that decode.

    Raises:
        InputError: no such model, no checkpoint of gve, or one of another base.
    """
    state: Mapping[str, Any] = {}
    lora = None
    if Path(name).is_file():
        checkpoint = read_checkpoint(name)
        record, state = checkpoint["gve"], checkpoint["state_dict"]
        base = base or record["base"]
        inputs = inputs or InputPolicy.from_dict(record["inputs"])
        if record["lora"] is not None:
            lora = Lora(**{**record["lora"], "targets": tuple(record["lora"]["targets"])})
    base = base or name
    builder = InputBuilder.from_base(base, inputs or InputPolicy())
    backbone = Backbone.from_pretrained(base, lora=lora, dtype=dtype, attention=attention)
    if state:
        if record["base_hash"] != backbone.base_hash:
            raise InputError(
                f"checkpoint {name} was trained on base {record['base']!r} (hash {record['base_hash'][:12]}), "
                f"{base!r} is another (hash {backbone.base_hash[:12]})"
            )
        backbone.load_trainable_state({key.removeprefix("backbone."): value for key, value in state.items()})
    backbone = backbone.to(device).eval()
    return BackboneEncoder(backbone, builder, batch_tokens=batch_tokens, num_workers=num_workers)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint of `gve fit` as plain tensors, mapped and not read.

    Raises:
        InputError: it cannot be read, holds more than tensors and plain values, or is of another program.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise InputError(f"checkpoint {path} cannot be read ({error.strerror})") from None
    except (UnpicklingError, RuntimeError, EOFError, ValueError, KeyError):
        raise InputError(f"{path} is no checkpoint that can be loaded as plain tensors: give one of gve fit") from None
    if not isinstance(checkpoint, dict) or "gve" not in checkpoint:
        raise InputError(f"checkpoint {path} was not written by gve: it names no base and no input policy")
    return checkpoint
