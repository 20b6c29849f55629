"""Opens an encoder by name: a checkpoint of `gve fit`, a Qwen2.5-VL (base, export, adapter), or another model.

An export carries a record of its own, gve.json: without it a folder is read by the released input policy.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from gve.encode.encoder import BackboneEncoder, Execution, LoadedEncoder
from gve.encode.mllm import RECIPES, MLLMEncoder
from gve.encode.mllm.recipes import family_of, recipe_named, untrained_recipe
from gve.inputs import InputBuilder, InputPolicy
from gve.items import InputError
from gve.model.adapters import SETTINGS, WEIGHTS, read_peft
from gve.model.backbone import Backbone, Lora
from gve.video import Sampling

RECORD = "gve.json"
"""In the folder of an exported model or adapter: {"format": 1, "inputs": its policy, "base": ..., "base_hash": ...}."""

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
        name: a file is a checkpoint of `gve fit`; anything else a model or adapter of PEFT: local folder or hub name.
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
        adapter = _adapter_of(name, files, base)
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
        found = []
        # All are fetched: each may decide.
        for file in ("config.json", SETTINGS, "modules.json", RECORD):
            path = _fetch(name, file)
            found += [path] if path and file != RECORD else []
        if not found:
            raise InputError(f"model {name!r} has neither config.json nor modules.json: it is no model of transformers")
        path = found[0]
        try:
            config = {} if path.name == "modules.json" else json.loads(path.read_text())
        except ValueError as error:
            raise InputError(f"model {name!r}: {path} is no JSON ({error})") from None
        return cls(config, path.parent)


def _adapter_of(name: str, files: ModelFiles, base: str) -> str:
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
    if "peft_type" in config:
        base = base or config.get("base_model_name_or_path") or ""
        if not base:
            raise InputError(f"adapter {name!r} names no base: say where it lies")
        if (found := ModelFiles.find(base).config.get("model_type")) != "qwen2_5_vl":
            raise InputError(
                f"adapter {name!r} is one of a {found!r}: name how the model is used, one of {', '.join(RECIPES)}"
            )
        return "gve"
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
    """A Qwen2.5-VL by the project's own input policy: trained weights on their base, or a whole model."""
    trained = read_trained(name)
    base = base or trained.base
    builder = InputBuilder.from_base(base, _policy(trained.inputs, inputs))
    backbone = Backbone.from_pretrained(base, lora=trained.lora, dtype=execution.dtype, attention=execution.attention)
    if trained.base_hash and trained.base_hash != backbone.base_hash:
        raise InputError(
            f"{trained.kind} {name} was trained on base {trained.base!r} (hash {trained.base_hash[:12]}), "
            f"{base!r} is another (hash {backbone.base_hash[:12]})"
        )
    if trained.lora is not None:
        backbone.load_trainable_state(trained.state)
    backbone = backbone.to(execution.device).eval()
    return BackboneEncoder(backbone, builder, batch_tokens=execution.batch_tokens, num_workers=execution.num_workers)


@dataclass(frozen=True, eq=False)
class Trained:
    """What a checkpoint, an adapter or a whole model is made of.

    Args:
        kind: "checkpoint", "adapter" or "model".
        base: where its base lies by its own word; itself for a whole model.
        inputs: its input policy.
        lora: settings of its adapters; None where it has none.
        state: their weights, as `Backbone.load_trainable_state` takes them.
        base_hash: of the base it was trained on; empty where it does not say.
        step: optimizer steps it was trained for; 0 where it does not say.
        sources: training sources it names.
    """

    kind: str
    base: str
    inputs: InputPolicy
    lora: Lora | None = None
    state: Mapping[str, torch.Tensor] = field(default_factory=dict)
    base_hash: str = ""
    step: int = 0
    sources: tuple[str, ...] = ()


def read_trained(name: str) -> Trained:
    """Reads what `load_encoder` would load as a Qwen2.5-VL, without its base.

    Args:
        name: a checkpoint of `gve fit`, an adapter folder of PEFT, or a model; local path or hub name.

    Raises:
        InputError: it cannot be read, or is of another program or kind.
    """
    if Path(name).is_file():
        checkpoint = read_checkpoint(name)
        record = checkpoint["gve"]
        lora = record["lora"]
        return Trained(
            kind="checkpoint",
            base=record["base"],
            inputs=InputPolicy.from_dict(record["inputs"]),
            lora=None if lora is None else Lora(**{**lora, "targets": tuple(lora["targets"])}),
            state={key.removeprefix("backbone."): value for key, value in checkpoint["state_dict"].items()},
            base_hash=record["base_hash"],
            step=int(checkpoint.get("global_step", 0)),
            sources=tuple(sorted(checkpoint.get("PyramidDataModule", {}).get("cursors", {}))),
        )
    files = ModelFiles.find(name)
    record = _record(files.folder)
    inputs = InputPolicy.from_dict(record["inputs"]) if record else InputPolicy()
    if "peft_type" not in files.config:
        return Trained("model", name, inputs)
    if not (files.folder / WEIGHTS).is_file():
        _fetch(name, WEIGHTS)
    lora, state, base = read_peft(files.folder)
    return Trained("adapter", base, inputs, lora, state, record.get("base_hash", ""), record.get("step", 0))


def _fetch(name: str, file: str) -> Path | None:
    """A file of a local folder or hub name; None if it has no such file.

    Raises:
        InputError: no such model.
    """
    from transformers.utils import cached_file

    try:
        path = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        raise InputError(f"model {name!r} cannot be found: {str(error).strip().splitlines()[0]}") from None
    return Path(path) if path else None


def _record(folder: Path) -> dict[str, Any]:
    """gve.json of an exported folder; empty where there is none."""
    path = folder / RECORD
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    if not isinstance(record, dict) or record.get("format") != 1 or not isinstance(record.get("inputs"), dict):
        raise InputError(f"{path} is no record of this version of gve: export the model again")
    return record


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
