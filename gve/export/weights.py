"""Merged weights as the files of a hub folder, under the names of the released Qwen2.5-VL checkpoints.

Those names (`visual.*`, `model.*`, `lm_head.weight`) are read by every reader there is: transformers since 4.49 renames
them as it needs, and vLLM maps them by prefix (`hf_to_vllm_mapper` of its qwen2_5_vl.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import Qwen2_5_VLConfig
from transformers.utils import cached_file

from gve.items import InputError
from gve.model.adapters import merged_weights
from gve.model.backbone import Backbone

SHARD_BYTES = 4 << 30
HEAD = "lm_head.weight"
_TEXT = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
    *("use_sliding_window", "sliding_window", "max_window_layers", "attention_dropout"),
    *("bos_token_id", "eos_token_id"),
)
_VISION = (
    *("depth", "hidden_act", "hidden_size", "intermediate_size", "num_heads", "in_channels", "out_hidden_size"),
    *("patch_size", "spatial_merge_size", "window_size", "fullatt_block_indexes", "tokens_per_second"),
    *("temporal_patch_size", "initializer_range"),
)


def hub_name(name: str) -> str:
    """A weight's name in the released checkpoints, from its name in Qwen2_5_VLModel of transformers 5.

    Raises:
        InputError: it belongs to neither half of the model.
    """
    half, _, rest = name.partition(".")
    if half == "language_model":
        return f"model.{rest}"
    if half == "visual":
        return name
    raise InputError(f"{name} is a weight of neither the language model nor the vision tower")


def write_weights(backbone: Backbone, base: str, dtype: torch.dtype, folder: Path, limit: int = SHARD_BYTES) -> str:
    """Writes the merged model as safetensors, in one file or in several with an index.

    Args:
        backbone: the model with its adapters.
        base: where its base lies: the LM head, which the backbone lacks, is copied from there where it is not tied.
        dtype: of the files; merged in float32 before the cast.
        folder: an existing folder.
        limit: most bytes of one file; no more than this is held beside the model.

    Returns:
        Hex SHA-256 over the names and SHA-256 of the files.
    """
    config = backbone.model.config
    files: list[tuple[Path, list[str]]] = []
    batch: dict[str, torch.Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal batch, size
        path = folder / f"draft-{len(files):05d}.safetensors"
        save_file(batch, path, metadata={"format": "pt"})
        files.append((path, list(batch)))
        batch, size = {}, 0

    for name, value in _all_weights(backbone, base, config):
        stored = value.to(dtype).cpu().contiguous()
        length = stored.numel() * stored.element_size()
        if batch and size + length > limit:
            flush()
        batch[name] = stored
        size += length
        total += length
    flush()
    digest, where = hashlib.sha256(), dict[str, str]()
    for number, (path, names) in enumerate(files, 1):
        final = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        _publish(path, folder / final)
        where |= dict.fromkeys(names, final)
        with open(folder / final, "rb") as file:
            digest.update(final.encode() + hashlib.file_digest(file, "sha256").digest())
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    return digest.hexdigest()


def _publish(draft: Path, final: Path) -> None:
    """Renames a file of safetensors, and gives it the mode of any other file: theirs are for the owner's eyes only."""
    final.touch()
    mode = final.stat().st_mode
    draft.replace(final)
    final.chmod(mode)


def write_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """One file of safetensors."""
    draft = path.with_name(f"draft-{path.name}")
    save_file(dict(tensors), draft, metadata={"format": "pt"})
    _publish(draft, path)


def hub_config(config: Qwen2_5_VLConfig, dtype: torch.dtype) -> dict[str, object]:
    """config.json in the flat layout of the released checkpoints: what transformers 4.52, 5.x and vLLM all read.

    transformers 5 writes another one, in which 4.x finds neither rope_theta nor the M-RoPE sections and takes defaults.

    Raises:
        InputError: the model has a rotary embedding that 4.x cannot express.
    """
    text, vision = config.text_config, config.vision_config
    rope = dict(text.rope_parameters)
    if rope.get("rope_type", "default") != "default" or "mrope_section" not in rope:
        raise InputError(f"rope_parameters {rope} are not those of a Qwen2.5-VL; only the default M-RoPE is exported")
    own = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "image_token_id": config.image_token_id,
        "video_token_id": config.video_token_id,
        "vision_start_token_id": config.vision_start_token_id,
        "vision_end_token_id": config.vision_end_token_id,
        **{name: getattr(text, name) for name in _TEXT},
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": list(rope["mrope_section"])},
        "tie_word_embeddings": bool(config.tie_word_embeddings),
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
        "vision_config": {
            "model_type": "qwen2_5_vl",
            **{name: getattr(vision, name) for name in _VISION},
        },
    }
    return {name: value for name, value in own.items() if value is not None}


def _all_weights(backbone: Backbone, base: str, config: Qwen2_5_VLConfig) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in merged_weights(backbone.model):
        yield hub_name(name), value
    if not config.tie_word_embeddings and (head := _head(base)) is not None:
        yield HEAD, head


def _head(base: str) -> torch.Tensor | None:
    """The LM head in a model's files; None if it was released without one."""
    index = cached_file(base, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    name = "model.safetensors"
    if index:
        name = json.loads(Path(index).read_text())["weight_map"].get(HEAD, "")
    path = cached_file(base, name, _raise_exceptions_for_missing_entries=False) if name else None
    if not path:
        return None
    with safe_open(path, "pt") as file:
        return file.get_tensor(HEAD) if HEAD in file.keys() else None  # noqa: SIM118 (no mapping)
