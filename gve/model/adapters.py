"""LoRA weights outside training: merged into the base, and in the files of PEFT.

PEFT names a weight after the module that held the adapter, so one adapter has other names for each class of
transformers that carried it, and loading by names that do not fit leaves the base as it is with no more than a warning.
Here every tensor finds its layer or the adapter is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from gve.items import InputError
from gve.model.backbone import TOWER_TARGETS, Lora

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# The language model's layers as PEFT names them under: Qwen2_5_VLModel, and the generation class, of transformers 4.52
# and later; the generation class of 4.49 to 4.51; and the same again where a trainer unwrapped PEFT itself.
_KEY = re.compile(
    r"(?:base_model\.model\.)?(?:model\.)?(?:language_model\.)?(?:model\.)?"
    r"(layers\.\d+\.(?:self_attn|mlp)\.(\w+_proj))\.(lora_[AB])(?:\.default)?\.weight"
)
_TOWER_KEY = re.compile(
    r"(?:base_model\.model\.)?(?:model\.)?(visual\.blocks\.\d+\.(?:attn|mlp)\.\w+)\.(lora_[AB])(?:\.default)?\.weight"
)
_UNSUPPORTED = (
    *("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication"),
    *("fan_in_fan_out", "lora_bias", "trainable_token_indices", "layers_to_transform"),
)


@torch.no_grad()
def merged_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights of a stock model with its adapters added: W + (alpha / r) B A, in float32 (arXiv 2106.09685).

    In bfloat16 the sum loses a good part of what the adapter learned: its change of a weight is often smaller than the
    distance to the next number.

    Args:
        model: a stock model with or without injected adapters; it is left as it is.

    Yields:
        (name in the stock model, value): float32 where an adapter was added, as stored elsewhere. One at a time: no
        second copy of the model exists.
    """
    adapted = {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
    for name, value in model.named_parameters():
        if ".lora_" in name:
            continue
        owner, _, own = name.rpartition(".")
        layer = adapted.get(owner.removesuffix(".base_layer"))
        if layer is None:
            yield name, value.detach()
            continue
        merged = value.detach()
        if own == "weight":
            for adapter in layer.active_adapters:
                merged = merged.float() + layer.get_delta_weight(adapter).float()
        yield f"{owner.removesuffix('.base_layer')}.{own}", merged


def to_peft(lora: Lora, state: Mapping[str, torch.Tensor], base: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """An adapter as PEFT's files hold it, for `AutoModel` of the base (Qwen2_5_VLModel, transformers >= 4.52).

    Args:
        lora: its settings.
        state: `Backbone.trainable_state`.
        base: name or folder of the base.

    Returns:
        The content of adapter_config.json, and of adapter_model.safetensors.
    """
    pattern = rf"language_model\.layers\.\d+\.(self_attn|mlp)\.({'|'.join(sorted(lora.targets))})"
    if lora.tower:
        pattern = rf"({pattern}|visual\.blocks\.\d+\.({'|'.join(map(re.escape, TOWER_TARGETS))}))"
    settings = {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "auto_mapping": {
            "base_model_class": "Qwen2_5_VLModel",
            "parent_library": "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
        },
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "bias": "none",
        # A pattern, not names: bare names would also hit the tower's MLPs.
        "target_modules": f".*{pattern}",
        "inference_mode": True,
    }
    tensors = {
        f"base_model.{name.replace('.default.weight', '.weight')}": value.contiguous().cpu()
        for name, value in state.items()
    }
    return settings, tensors


def read_peft(folder: Path) -> tuple[Lora, dict[str, torch.Tensor], str]:
    """An adapter folder of PEFT, trained by any program on a Qwen2.5-VL.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.

    Returns:
        Settings, weights as `Backbone.load_trainable_state` takes them, and the base it names.

    Raises:
        InputError: it cannot be read, is no plain LoRA, or adapts other layers than `Lora` can.
    """
    path = folder / SETTINGS
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    extras = [name for name in _UNSUPPORTED if settings.get(name)]
    if settings.get("peft_type") != "LORA" or settings.get("bias", "none") != "none" or extras:
        raise InputError(
            f"{path}: only plain LoRA is loaded (peft_type {settings.get('peft_type')!r}, bias "
            f"{settings.get('bias', 'none')!r}{', ' + ', '.join(extras) if extras else ''}): merge it with peft first"
        )
    try:
        tensors = load_file(folder / WEIGHTS)
    except FileNotFoundError:
        raise InputError(f"{folder} has no {WEIGHTS} (pickled weights are not loaded)") from None
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder / WEIGHTS} cannot be read: {error}") from None
    state, targets, tower = {}, set(), False
    for key, value in tensors.items():
        if (match := _TOWER_KEY.fullmatch(key)) is not None:
            tower = True
            state[f"model.{match[1]}.{match[2]}.default.weight"] = value.float()
            continue
        match = _KEY.fullmatch(key)
        if match is None:
            raise InputError(
                f"{folder / WEIGHTS} holds {key!r}, which is no LoRA weight of the language model's layers or "
                "of the tower's blocks: nothing else is adapted here, so merge it with peft first"
            )
        targets.add(match[2])
        state[f"model.language_model.{match[1]}.{match[3]}.default.weight"] = value.float()
    try:
        lora = Lora(
            rank=settings["r"], alpha=settings["lora_alpha"], dropout=0.0, targets=tuple(sorted(targets)), tower=tower
        )
    except KeyError as error:
        raise InputError(f"{path} lacks {error}") from None
    return lora, state, settings.get("base_model_name_or_path") or ""
