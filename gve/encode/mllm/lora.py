"""LoRA and DoRA weights that are released without their base, merged into it (VLM2Vec-V2, B3).

peft would load them too, but by names: those of transformers 4 do not fit the modules of transformers 5, and what does
not fit is dropped with a warning. Here every tensor finds its layer or the model is refused.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from gve.items import InputError

_KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.default)?(?:\.weight)?")
_UNSUPPORTED = ("rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication", "fan_in_fan_out", "lora_bias")


def read_settings(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a folder.

    Raises:
        InputError: it cannot be read, or is of another kind than LoRA or DoRA without extras.
    """
    path = folder / "adapter_config.json"
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    extras = [name for name in _UNSUPPORTED if settings.get(name)]
    if settings.get("peft_type") != "LORA" or settings.get("bias", "none") != "none" or extras:
        raise InputError(
            f"{path}: only LoRA and DoRA are merged (peft_type {settings.get('peft_type')!r}, bias "
            f"{settings.get('bias', 'none')!r}{', ' + ', '.join(extras) if extras else ''}): merge it with peft first"
        )
    return settings


@torch.no_grad()
def merge_adapter(model: nn.Module, folder: Path) -> int:
    """Adds the adapter to the model's weights, in float32.

    W' = W + s B A with s = alpha / r (alpha / sqrt(r) with rsLoRA); DoRA: each row of that brought to its magnitude
    (arXiv 2106.09685, 2402.09353; peft's `merge_and_unload`).

    Args:
        model: of transformers, without an LM head.
        folder: with adapter_config.json and adapter_model.safetensors.

    Returns:
        How many layers were changed.

    Raises:
        InputError: no adapter, or one whose tensors do not all fit this model.
    """
    settings = read_settings(folder)
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise InputError(f"{folder} has no adapter_model.safetensors (pickled weights are not loaded)")
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in load_file(path).items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise InputError(f"{path} holds {key!r}, which is no LoRA tensor")
        layers.setdefault(match[1], {})[match[2]] = value.float()
    modules = dict(model.named_modules())
    for name, own in layers.items():
        module = modules.get(_place(name))
        if not isinstance(module, nn.Linear) or not {"lora_A", "lora_B"} <= set(own):
            raise InputError(
                f"{path}: {name!r} is no layer of this model, or lacks a half: it is another base's adapter"
            )
        rank = own["lora_A"].shape[0]
        scale = settings["lora_alpha"] / (rank**0.5 if settings.get("use_rslora") else rank)
        if (own["lora_B"].shape[0], own["lora_A"].shape[1]) != tuple(module.weight.shape):
            raise InputError(f"{path}: {name!r} does not have the shape of its layer: it is another base's adapter")
        device = module.weight.device
        merged = module.weight.float() + scale * (own["lora_B"].to(device) @ own["lora_A"].to(device))
        if settings.get("use_dora"):
            magnitude = own["lora_magnitude_vector"].to(device)
            merged *= (magnitude / torch.linalg.norm(merged, dim=1))[:, None]
        module.weight.copy_(merged)
    return len(layers)


def _place(name: str) -> str:
    """A layer's name in transformers 4's generation class as the base model of transformers 5 has it."""
    name = name.removeprefix("model.")
    return f"language_model.{name}" if name.startswith("layers.") else name
