"""The `Encoder` around a multimodal language model of another maker."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import transformers
from torch.nn.functional import normalize
from transformers.utils import cached_file

from gve.encode.decoding import Decoding, fingerprint_of, weights_hash
from gve.encode.encoder import Encoded, Execution, Transform, progress_bar
from gve.encode.mllm.llava import LlavaReader
from gve.encode.mllm.lora import merge_adapter, read_settings
from gve.encode.mllm.qwen import QwenReader
from gve.encode.mllm.recipes import Recipe, Turn, family_of
from gve.encode.mllm.settings import Settings
from gve.inputs import InputPolicy
from gve.items import InputError, Item
from gve.model.backbone import load_weights

# Names, not classes: each is a module of thousands of lines, and one run needs one of them.
_CLASSES = {
    "qwen2_vl": "Qwen2VL",
    "qwen3_vl": "Qwen3VL",
    "llava_next": "LlavaNext",
    "llava_onevision": "LlavaOnevision",
}


class Reader(Protocol):
    """What makes the inputs of one architecture and runs it; it pickles, so loader workers may call it."""

    recipe: Recipe
    settings: Settings

    def __call__(self, item: Item) -> Any:
        """A decoded item's tensors, with its [L] int64 `ids`."""

    def collate(self, prepared: Sequence[Any]) -> Any:
        """A batch of them, with the [B] int64 `pool_index` of the last tokens, that can be moved to a device."""

    def states(self, model: Any, batch: Any) -> torch.Tensor:
        """[B, L, D] states after the final norm."""

    def chat(self, content: Sequence[Any]) -> str:
        """The prompt of one user turn by the model's own chat template."""

    def limits(self) -> dict[str, Any]:
        """The settings that decide this architecture's inputs."""


class MLLMEncoder:
    """Encodes with a stock model of transformers by a recipe: the state of the last token, of unit length.

    Args:
        model: without its LM head, so that its last state is the one after the final norm.
        reader: makes its inputs.
        batch_tokens: most tokens of one forward pass, padding included.
        num_workers: loader processes that decode and make inputs.
    """

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        reader: Reader,
        *,
        batch_tokens: int = 16384,
        num_workers: int = 0,
    ) -> None:
        self.model, self.reader = model.eval(), reader
        self.batch_tokens = batch_tokens
        self.decoding: Decoding[Any] = Decoding(reader.settings.sampling, reader, num_workers=num_workers)

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        recipe: Recipe,
        *,
        base: str = "",
        inputs: InputPolicy | Mapping[str, Any] | None = None,
        execution: Execution | None = None,
    ) -> MLLMEncoder:
        """The encoder of a local folder or hub name; no code of the repository is run.

        Args:
            name: folder or hub name; it may hold a LoRA adapter alone.
            recipe: how the model is used.
            base: where an adapter's base lies; the one that it names when empty.
            inputs: changes of the recipe's settings.
            execution: device, dtype, kernel, batches, workers.

        Raises:
            InputError: no such model, one of another architecture, or files are missing.
        """
        execution = execution or Execution()
        adapter = _adapter_folder(name)
        source = name
        if adapter is not None:
            source = base if base not in ("", name) else read_settings(adapter)["base_model_name_or_path"]
        config_class = getattr(transformers, f"{_CLASSES[recipe.family]}Config")
        model_class = getattr(transformers, f"{_CLASSES[recipe.family]}Model")
        settings = recipe.settings.changed(inputs)
        try:
            config = config_class.from_pretrained(source)
            tokenizer = _tokenizer(source if adapter is None or not _has_tokenizer(adapter) else str(adapter))
        except (OSError, ValueError) as error:
            raise InputError(f"model {source!r} cannot be opened: {str(error).strip().splitlines()[0]}") from None
        if family_of(config.model_type) != recipe.family:
            raise InputError(
                f"model {source!r} is a {config.model_type!r}, adapter {recipe.name} takes {recipe.family}"
            )
        config.model_type = recipe.family  # UNITE's files name a type of their own, which hides the old names' mapping
        options = {
            "config": config,
            "dtype": getattr(torch, execution.dtype),
            "attn_implementation": execution.attention,
        }
        model = load_weights(model_class, source, options)
        if adapter is not None:
            merge_adapter(model, adapter)
        reader: Reader
        if recipe.family in ("llava_next", "llava_onevision"):
            reader = LlavaReader(recipe, settings, tokenizer, config, _image_processor(source))
        else:
            reader = QwenReader(recipe, settings, tokenizer, config)
        model = model.to(execution.device)
        return cls(model, reader, batch_tokens=execution.batch_tokens, num_workers=execution.num_workers)

    @property
    def dim(self) -> int:
        return int(self.model.config.text_config.hidden_size)

    @cached_property
    def weights_hash(self) -> str:
        return weights_hash(self.model)

    @property
    def inputs(self) -> dict[str, Any]:
        """The recipe with its prompts written out, {instruction} and {text} standing for an item's own."""
        recipe = self.reader.recipe
        shown = {"T": (), "I": ("image",), "V": ("video",), "TV": ("video",)}
        prompts = {}
        for side, instruction in (("query", "{instruction}"), ("target", "")):
            for form, kinds in shown.items():
                media = "".join(recipe.image if kind == "image" else recipe.video for kind in kinds)
                turn = Turn(instruction, "{text}" if "T" in form else "", media, kinds, self.reader.chat)
                prompts[f"{side} {form}"] = recipe.prompt(turn)
        return {
            "adapter": recipe.name,
            "architecture": recipe.family,
            "clips": recipe.clips,
            "positions": recipe.positions,
            "image_px": recipe.image_px,
            **self.reader.limits(),
            "prompts": prompts,
        }

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.weights_hash, self.inputs)

    def encode(self, items: Sequence[Item], *, transform: Transform | None = None, progress: str = "") -> Encoded:
        vectors = np.full((len(items), self.dim), np.nan, np.float32)
        failures: dict[int, str] = {}
        with torch.inference_mode(), progress_bar(progress, len(items)) as advance:
            for ready, lost in self.decoding(items, transform):
                failures |= lost
                by_length = sorted(ready, key=lambda row: len(ready[row].ids))
                while by_length:
                    longest = len(ready[by_length[-1]].ids)
                    taken = by_length[-max(1, self.batch_tokens // longest) :]
                    del by_length[-len(taken) :]
                    vectors[taken] = self._embed([ready[row] for row in taken])
                advance(len(ready) + len(lost))
        return Encoded(vectors, failures)

    def _embed(self, prepared: Sequence[Any]) -> np.ndarray:
        """[n, D] unit rows."""
        batch = self.reader.collate(prepared).to(self.model.device)
        states = self.reader.states(self.model, batch)
        pooled = states[torch.arange(len(prepared), device=states.device), batch.pool_index]
        return normalize(pooled.float(), dim=-1).cpu().numpy()


def _adapter_folder(name: str) -> Path | None:
    """Where an adapter without its base lies; None for a whole model."""
    folder = Path(name)
    if not folder.is_dir():
        found = cached_file(name, "adapter_config.json", _raise_exceptions_for_missing_entries=False)
        if not found:
            return None
        cached_file(name, "adapter_model.safetensors", _raise_exceptions_for_missing_entries=False)
        folder = Path(found).parent
    whole = any(folder.glob("model*.safetensors"))
    return folder if (folder / "adapter_config.json").is_file() and not whole else None


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer_config.json").is_file()


def _tokenizer(source: str) -> Any:
    """The model's tokenizer with the chat template of its processor, which older repositories keep in a file apart."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    if not tokenizer.chat_template:
        found = cached_file(source, "chat_template.json", _raise_exceptions_for_missing_entries=False)
        if found:
            tokenizer.chat_template = json.loads(Path(found).read_text())["chat_template"]
    return tokenizer


def _image_processor(source: str) -> Any:
    """The PIL-backed image processor: the default needs torchvision."""
    try:
        return transformers.AutoImageProcessor.from_pretrained(source, backend="pil")
    except (OSError, ValueError) as error:
        raise InputError(f"model {source!r} has no image processor: {str(error).strip().splitlines()[0]}") from None
