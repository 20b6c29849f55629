"""Opens an encoder by name: a checkpoint of `gve fit`, a Qwen2.5-VL base or export, or another published model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from gve.encode.encoder import BackboneEncoder, Execution, LoadedEncoder
from gve.encode.mllm import RECIPES, MLLMEncoder
from gve.encode.mllm.recipes import family_of, recipe_named, untrained_recipe
from gve.inputs import InputBuilder, InputPolicy
from gve.items import InputError
from gve.model.backbone import Backbone, Lora
from gve.video import Sampling

ADAPTERS = ("auto", "gve", *RECIPES, "clip", "sentence-transformers")


def load_encoder(
    name: str,
    *,
    adapter: str = "auto",
    base: str = "",
    inputs: InputPolicy | Mapping[str, Any] | None = None,
    execution: Execution | None = None,
) -> LoadedEncoder:
    """An encoder in eval mode.

    Args:
        name: a file is a checkpoint of `gve fit`; anything else a model: local folder or hub name.
        adapter: how the model is used: "gve" (Qwen2.5-VL by the project's input policy), a recipe of `gve.encode.mllm`,
            "clip" (dual encoders), "sentence-transformers". "auto" decides by the model's name and files.
        base: where the base of a checkpoint or of a LoRA adapter lies now; the place it was trained from when empty.
        inputs: None takes the model's own settings (a checkpoint's policy, a model's published usage). A mapping
            changes single fields of them, named as in `InputPolicy`: `sampling`, `max_frame_tokens`,
            `max_image_tokens`, `max_length` are understood by every model that has such a thing. A whole
            `InputPolicy` replaces them; of it, models other than Qwen2.5-VL take those four.
        execution: device, dtype, kernel, batches, workers; the defaults when None.

    Raises:
        InputError: no such model or adapter, no checkpoint of gve, or one of another base.
    """
    if adapter not in ADAPTERS:
        raise InputError(f"adapter {adapter!r} is unknown; use one of {', '.join(ADAPTERS)}")
    execution = execution or Execution()
    if Path(name).is_file():
        return _backbone(name, base, inputs, execution)
    files = ModelFiles.find(name)
    if adapter == "auto":
        adapter = _adapter_of(name, files)
    if adapter == "gve":
        return _backbone(name, base, inputs, execution)
    if adapter in RECIPES:
        return MLLMEncoder.from_pretrained(name, RECIPES[adapter], base=base, inputs=inputs, execution=execution)
    from gve.encode.clip import ClipEncoder
    from gve.encode.sentence import SentenceEncoder

    load = ClipEncoder.from_pretrained if adapter == "clip" else SentenceEncoder.from_pretrained
    return load(
        name,
        sampling=_sampling(inputs),
        device=execution.device,
        dtype=execution.dtype,
        num_workers=execution.num_workers,
    )


@dataclass(frozen=True)
class ModelFiles:
    """What a model's small files say, before any weight is read.

    Args:
        config: content of config.json, or of adapter_config.json where it stands alone; empty where there is neither.
        folder: where the files lie: the folder itself, or the snapshot of a hub name in the cache.
    """

    config: Mapping[str, Any]
    folder: Path

    @classmethod
    def find(cls, name: str) -> ModelFiles:
        """The files of a local folder or hub name.

        Raises:
            InputError: no such model.
        """
        if not Path(name).exists() and (name.startswith(("/", ".")) or name.count("/") > 1):
            raise InputError(
                f"model {name!r} does not exist: give a file, a folder, or a hub name like Qwen/Qwen2-VL-2B"
            )
        from transformers.utils import cached_file

        found = []
        for file in ("config.json", "adapter_config.json", "modules.json"):  # all are fetched: each may decide
            try:
                path = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
            except (OSError, ValueError) as error:
                raise InputError(f"model {name!r} cannot be found: {str(error).strip().splitlines()[0]}") from None
            found += [Path(path)] if path else []
        if not found:
            raise InputError(f"model {name!r} has neither config.json nor modules.json: it is no model of transformers")
        path = found[0]
        try:
            config = {} if path.name == "modules.json" else json.loads(path.read_text())
        except ValueError as error:
            raise InputError(f"model {name!r}: {path} is no JSON ({error})") from None
        return cls(config, path.parent)


def _adapter_of(name: str, files: ModelFiles) -> str:
    """The adapter that a model's name or files ask for.

    A name comes first: repositories of these models carry files for sentence-transformers too, with other prompts.

    Raises:
        InputError: none is made for them.
    """
    from gve.encode.clip import ClipEncoder
    from gve.encode.sentence import SentenceEncoder

    config = dict(files.config)
    model_type = config.get("model_type", "")
    if recipe := recipe_named(name):
        return recipe.name
    if model_type == "qwen2_5_vl":
        return "gve"
    if SentenceEncoder.matches(config, files.folder):
        return "sentence-transformers"
    if ClipEncoder.matches(config, files.folder):
        return "clip"
    if family_of(model_type):
        recipe = untrained_recipe(name, model_type)
        warnings.warn(
            f"model {name!r} is known by its architecture alone and is read as an untrained base (adapter "
            f"{recipe.name}): name its own adapter if it is one of {', '.join(RECIPES)}",
            stacklevel=3,
        )
        return recipe.name
    if config.get("auto_map"):
        raise InputError(
            f"model {name!r} ({model_type or 'no type'}) needs code of its own repository, which is never run here"
        )
    raise InputError(
        f"model {name!r} is a {model_type!r}: no adapter is made for it; choose one of {', '.join(ADAPTERS[1:])}"
    )


def _sampling(inputs: InputPolicy | Mapping[str, Any] | None) -> Sampling | None:
    """The frames that a caller asks for; None leaves them to the model."""
    if isinstance(inputs, InputPolicy):
        return inputs.sampling
    return (inputs or {}).get("sampling")


def _policy(own: InputPolicy, inputs: InputPolicy | Mapping[str, Any] | None) -> InputPolicy:
    return inputs if isinstance(inputs, InputPolicy) else own.replace(**(inputs or {}))


def _backbone(
    name: str, base: str, inputs: InputPolicy | Mapping[str, Any] | None, execution: Execution
) -> BackboneEncoder:
    """A Qwen2.5-VL by the project's own input policy: a checkpoint on its base, or the base alone."""
    own, state, lora = InputPolicy(), {}, None
    if Path(name).is_file():
        checkpoint = read_checkpoint(name)
        record, state = checkpoint["gve"], checkpoint["state_dict"]
        base = base or record["base"]
        own = InputPolicy.from_dict(record["inputs"])
        if record["lora"] is not None:
            lora = Lora(**{**record["lora"], "targets": tuple(record["lora"]["targets"])})
    base = base or name
    builder = InputBuilder.from_base(base, _policy(own, inputs))
    backbone = Backbone.from_pretrained(base, lora=lora, dtype=execution.dtype, attention=execution.attention)
    if state:
        if record["base_hash"] != backbone.base_hash:
            raise InputError(
                f"checkpoint {name} was trained on base {record['base']!r} (hash {record['base_hash'][:12]}), "
                f"{base!r} is another (hash {backbone.base_hash[:12]})"
            )
        backbone.load_trainable_state({key.removeprefix("backbone."): value for key, value in state.items()})
    backbone = backbone.to(execution.device).eval()
    return BackboneEncoder(backbone, builder, batch_tokens=execution.batch_tokens, num_workers=execution.num_workers)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint of `gve fit` as plain tensors, mapped and not read.

    Raises:
        InputError: it cannot be read, holds more than tensors and plain values, or is of another program.
    """
    try:
        open(path, "rb").close()
    except OSError as error:
        raise InputError(f"checkpoint {path} cannot be read ({error.strerror})") from None
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError):  # an empty file cannot be mapped
        raise InputError(f"{path} is no checkpoint that can be loaded as plain tensors: give one of gve fit") from None
    if not isinstance(checkpoint, dict) or "gve" not in checkpoint:
        raise InputError(f"checkpoint {path} was not written by gve: it names no base and no input policy")
    return checkpoint
