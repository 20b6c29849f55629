"""Qwen2.5-VL without its LM head, as an embedder: frozen vision tower and token embeddings, LoRA, last-token pooling.

The only module that runs transformers and peft. The vision tower is constant, so it runs without gradient, in eval
mode also while training, and once per distinct picture: its merged tokens are plain values that a caller may keep.
Adapters on the tower (`Lora.tower`, an ablation) take that away: gradients pass, and nothing is kept.
"""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import peft
import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers.modeling_outputs import BaseModelOutputWithPooling

from gve.inputs import normalised
from gve.items import EmbedBatch, InputError
from gve.model.clock import CLOCK

ARCHITECTURES = Path(__file__).parent / "architectures"

Features = Mapping[tuple[str, str], torch.Tensor]
"""("image" or "video", media key) -> [tokens, D], the tower's merged tokens of one picture or clip."""


@dataclass(frozen=True)
class Lora:
    """LoRA on the language model (paper: six modules, no o_proj; gve.md section 2).

    Args:
        rank: r of the adapters.
        alpha: the update is scaled by alpha / rank.
        dropout: on the adapters' input, while training.
        targets: names of the linear layers of each decoder layer that are adapted.
        tower: also adapt the linear layers of the vision tower's blocks (`TOWER_TARGETS`), without dropout. The paper
            freezes the tower; this is the ablation. Its features then change with every step and are never kept.
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.1
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "up_proj", "gate_proj", "down_proj")
    tower: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 <= self.dropout < 1 or not self.targets:
            raise InputError(f"{self} is no LoRA: rank must be >= 1, dropout in [0, 1), targets at least one")


TOWER_TARGETS = ("attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
"""Linear layers of each block of the vision tower."""


class Backbone(nn.Module):
    """Embeds batches of items. Build it with `from_pretrained`.

    Args:
        model: the stock model, in eval mode or not; it is frozen and adapted in place.
        lora: adapters to train, or None to train nothing.
        gradient_checkpointing: recompute the decoder layers in backward (all but the last): less memory, about a third
            more time.
        feature_cache_bytes: how much host memory may hold the tower's tokens of pictures seen before; 0 for none.
            Worth it where epochs repeat the same clips and fit; about tokens * D * 4 bytes each in float32.

    Attributes:
        dim: D, size of the embedding.
        base_hash: names the base weights: SHA-256 over name, shape and up to 4096 evenly spaced values of each tensor,
            so it takes milliseconds at any size and does not depend on files. "meta" for weights without values.
        shards: parts whose weights are split over the ranks (gve.model.sharding); none by default.
    """

    def __init__(
        self,
        model: transformers.Qwen2_5_VLModel,
        lora: Lora | None = None,
        *,
        gradient_checkpointing: bool = False,
        feature_cache_bytes: int = 0,
    ) -> None:
        super().__init__()
        model.requires_grad_(False)
        self.dim: int = model.config.text_config.hidden_size
        self.base_hash = _fingerprint(model)
        if lora is not None:
            _adapt(model, lora)
        if gradient_checkpointing:
            model.language_model.activation_checkpointing_enable({"use_reentrant": False})
            # Recomputing it would not see `_mlp_input`, and its MLP keeps next to nothing.
            model.language_model.layers[-1].gradient_checkpointing = False
        self.model = model
        self.lora = lora
        self._cache: OrderedDict[tuple[str, str], torch.Tensor] = OrderedDict()
        self._cache_room = 0 if self.tower_trains else feature_cache_bytes
        self.shards: list[FSDPModule] = []
        self._gathered = False
        self.train()

    @classmethod
    def from_pretrained(
        cls,
        base: str,
        *,
        lora: Lora | None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        attention: str = "sdpa",
        from_scratch: bool = False,
        gradient_checkpointing: bool = False,
        feature_cache_bytes: int = 0,
    ) -> Backbone:
        """Loads a base model.

        Args:
            base: hub name, local folder, config file (.json), or a name in gve/model/architectures (no weights).
            lora: adapters to train, or None to train nothing.
            dtype: of the base; adapters are always float32.
            attention: kernel of tower and language model: "sdpa", "eager" or "flash_attention_2".
            from_scratch: random weights from torch's global generator; needed where `base` has none.

        Raises:
            InputError: no such base, not a Qwen2.5-VL, or weights are missing.
        """
        config = _config(base)
        options = {"dtype": getattr(torch, dtype), "attn_implementation": attention}
        if from_scratch:
            model = transformers.Qwen2_5_VLModel._from_config(config, **options)
        elif base.endswith(".json") or base in _architectures():
            raise InputError(f"base {base!r} is a configuration without weights; set from_scratch to make random ones")
        else:
            # Files of 4.52's generation class: transformers 5.23 would look for their tower in the language model.
            names = {r"^model\.visual\.": "visual."}
            model = load_weights(transformers.Qwen2_5_VLModel, base, {**options, "key_mapping": names})
        return cls(model, lora, gradient_checkpointing=gradient_checkpointing, feature_cache_bytes=feature_cache_bytes)

    @property
    def tower_trains(self) -> bool:
        """Whether the tower has adapters: features then belong to the weights of the moment, and must not be kept."""
        return self.lora is not None and self.lora.tower

    def media_features(self, *batches: EmbedBatch | None, max_tokens: int = 0) -> Features:
        """Runs the tower once over every distinct picture of the batches; images and clips share one call.

        Args:
            batches: any number; those of one training step belong together. None is skipped.
            max_tokens: merged tokens that the tower may give in one call; more pictures are spread over several. A
                larger picture has a call of its own. 0: one call.

        Returns:
            The merged tokens of each picture; with gradient only where the tower trains.
        """
        merge = self.model.visual.spatial_merge_unit
        features: dict[tuple[str, str], torch.Tensor] = {}
        fresh: list[_Picture] = []
        for batch in batches:
            for kind, keys, pixels, grid, colours in _media(batch):
                sizes = grid.prod(-1).tolist()
                for key, piece, shape, size in zip(keys, pixels.split(sizes), grid, sizes, strict=True):
                    name = (kind, key)
                    if name in features:
                        continue
                    features[name] = piece
                    if name in self._cache:
                        self._cache.move_to_end(name)
                        features[name] = self._cache[name].to(piece.device)
                        continue
                    fresh.append(_Picture(name, piece, shape, size // merge, colours))
        for group in _groups(fresh, max_tokens):
            names, pieces, shapes, tokens, _ = zip(*group, strict=True)
            mean, std = group[0].colours  # pictures of one model have the same
            with CLOCK.phase("tower"), torch.set_grad_enabled(self.tower_trains and torch.is_grad_enabled()):
                patches = normalised(torch.cat(pieces), mean, std).to(self.model.visual.dtype)
                merged = self.model.visual(patches, grid_thw=torch.stack(shapes)).pooler_output
            for name, rows in zip(names, merged.split(tokens), strict=True):
                features[name] = rows
                self._remember(name, rows)
        return features

    def forward(self, batch: EmbedBatch, features: Features | None = None) -> torch.Tensor:
        """Embeds B items: the state of the pooled token after the last layer and the final norm, of unit length.

        Args:
            batch: B items.
            features: what `media_features` returned for this batch; computed when None.

        Returns:
            [B, D] float32 unit rows.

        Raises:
            InputError: placeholders and pictures of the batch do not match one to one.
        """
        if self.training:
            self._gather(False)
        if features is None:
            features = self.media_features(batch)
        config = self.model.config
        tokens = {}
        for kind, token_id, keys in (
            ("image", config.image_token_id, batch.image_keys),
            ("video", config.video_token_id, batch.video_keys),
        ):
            media = tuple(features[kind, key] for key in keys)
            _check_placeholders(kind, batch.input_ids == token_id, [len(rows) for rows in media])
            if media:
                tokens[kind] = BaseModelOutputWithPooling(pooler_output=media)
        # Under causal attention nothing that is read can see padding on its right: no mask, and the fast kernel.
        padded_right = bool((batch.attention_mask.sum(1) == batch.pool_index + 1).all())
        rows = torch.arange(len(batch), device=batch.pool_index.device)
        last_norm = self.model.language_model.layers[-1].post_attention_layernorm
        CLOCK.count_tokens(batch.attention_mask)
        with CLOCK.phase("decoder"), _mlp_input(last_norm, rows, batch.pool_index):
            states = self.model(
                input_ids=batch.input_ids,
                attention_mask=None if padded_right else batch.attention_mask,
                position_ids=batch.position_ids,
                mm_encoder_outputs=tokens,
                use_cache=False,
            ).last_hidden_state
        pooled = states[rows, batch.pool_index]
        with torch.autocast(pooled.device.type, enabled=False):
            return nn.functional.normalize(pooled.float(), dim=-1)

    def train(self, mode: bool = True) -> Backbone:
        """As usual, but the tower stays in eval mode: it is frozen and its features are kept.

        Eval mode makes sharded weights whole (a collective: all ranks enter it together), until the next forward in
        training mode. So ranks may embed unequal numbers of batches in evaluation, probing and mining.
        """
        super().train(mode)
        self.model.visual.eval()
        if not mode:
            self._gather(True)
        return self

    @contextmanager
    def adapters_off(self) -> Iterator[None]:
        """Inside, the untrained base answers."""
        layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        layers = [layer for layer in layers if not layer.disable_adapters]
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)

    def trainable_state(self) -> dict[str, torch.Tensor]:
        """Name -> tensor of everything that trains, detached; names as in `named_parameters`."""
        return {name: value.detach() for name, value in self.named_parameters() if _is_adapter(name)}

    def load_trainable_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Puts trained weights in place.

        Raises:
            InputError: the names or shapes are not exactly those of this backbone.
        """
        own = self.trainable_state()
        check_same_weights({name: value.shape for name, value in own.items()}, state)
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(state[name])

    def weights_hash(self) -> str:
        """Hex SHA-256 of the base and of the adapters as they are now; inside `adapters_off` of the base alone."""
        digest = hashlib.sha256(self.base_hash.encode())
        layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        if not any(layer.disable_adapters for layer in layers):
            scale = self.lora.alpha / self.lora.rank if self.lora else 0
            digest.update(f"alpha/rank={scale}".encode() if layers else b"")
            for name, value in self.trainable_state().items():
                digest.update(name.encode() + value.float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def describe(self) -> list[str]:
        """Start-up self-check: what trains, what is frozen, what is pooled, which kernels run; one line each."""
        counts = {True: 0, False: 0}
        for parameter in self.parameters():
            counts[parameter.requires_grad] += parameter.numel()
        adapted = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        text, tower = self.model.language_model.config, self.model.visual
        tower_training = any(module.training for module in tower.modules())
        lora = f"LoRA r={self.lora.rank} on {len(adapted)} layers" if self.lora else "no adapters"
        return [
            f"trainable parameters: {counts[True]:,} of {sum(counts.values()):,} ({lora})",
            f"vision tower: {sum(p.requires_grad for p in tower.parameters())} trainable tensors, "
            f"{'TRAIN' if tower_training else 'eval'} mode, {'adapted' if self.tower_trains else 'no gradient'}",
            f"pooled token: last attended, after the final norm, D={self.dim}, unit length in float32",
            f"attention kernel: tower {tower.config._attn_implementation}, language model {text._attn_implementation}; "
            f"base {self.model.dtype}".replace("torch.", ""),
        ]

    def _gather(self, whole: bool) -> None:
        if self._gathered == whole:
            return
        for part in self.shards:
            part.set_reshard_after_forward(not whole, recurse=False)
            if whole:
                part.unshard()
            else:
                part.reshard()
        self._gathered = whole and bool(self.shards)

    def _remember(self, name: tuple[str, str], tokens: torch.Tensor) -> None:
        size = tokens.numel() * tokens.element_size()
        if size > self._cache_room:
            while self._cache and size > self._cache_room:
                _, oldest = self._cache.popitem(last=False)
                self._cache_room += oldest.numel() * oldest.element_size()
            if size > self._cache_room:
                return
        self._cache[name] = tokens.to("cpu", copy=True)
        self._cache_room -= size


def check_same_weights(expected: Mapping[str, torch.Size], state: Mapping[str, torch.Tensor]) -> None:
    """Trained weights fit only the same adapters: a missing name would silently leave the base as it is.

    Raises:
        InputError: names or shapes differ; says how many and shows one.
    """
    missing = sorted(set(expected) - set(state))
    surplus = sorted(set(state) - set(expected))
    wrong = [name for name in expected if name in state and state[name].shape != expected[name]]
    if missing or surplus or wrong:
        raise InputError(
            f"the trained weights do not fit this model: {len(missing)} missing, {len(surplus)} unknown, "
            f"{len(wrong)} of another shape, for example {(missing + surplus + wrong)[0]}; "
            "use the same base and the same lora settings"
        )


_Colours = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation
_Media = tuple[str, tuple[str, ...], torch.Tensor, torch.Tensor, _Colours]  # kind, keys, patches, grids


class _Picture(NamedTuple):
    name: tuple[str, str]
    patches: torch.Tensor
    grid: torch.Tensor
    tokens: int
    colours: _Colours


def _groups(pictures: list[_Picture], max_tokens: int) -> Iterator[list[_Picture]]:
    """Pictures in order, in groups of at most so many tokens; 0: one group."""
    group: list[_Picture] = []
    for picture in pictures:
        if group and max_tokens and sum(one.tokens for one in group) + picture.tokens > max_tokens:
            yield group
            group = []
        group.append(picture)
    if group:
        yield group


def _media(batch: EmbedBatch | None) -> Iterator[_Media]:
    if batch is None:
        return
    colours = (batch.pixel_mean, batch.pixel_std)
    if batch.image_patches is not None and batch.image_grid is not None:
        yield "image", batch.image_keys, batch.image_patches, batch.image_grid, colours
    if batch.video_patches is not None and batch.video_grid is not None:
        yield "video", batch.video_keys, batch.video_patches, batch.video_grid, colours


@contextmanager
def _mlp_input(last_norm: nn.Module, rows: torch.Tensor, pool_index: torch.Tensor) -> Iterator[None]:
    """Inside, the last layer's MLP runs on the pooled tokens only: nothing else of that layer's output is read.

    The MLP's [B, 1, D] is then added to all L positions of the residual; it is right at the pooled one. The MLP is most
    of a layer: this is a fifth of the work of a 4-layer model, 1/30 of a 28-layer one.
    """
    handle = last_norm.register_forward_pre_hook(lambda module, args: (args[0][rows, pool_index].unsqueeze(1),))
    try:
        yield
    finally:
        handle.remove()


def _check_placeholders(kind: str, placeholder: torch.Tensor, sizes: list[int]) -> None:
    """Each picture must meet one run of as many placeholders: a right total can hide two wrong samples."""
    runs = placeholder & ~nn.functional.pad(placeholder, (1, 0))[:, :-1]
    counts = torch.bincount(runs.flatten().cumsum(0)[placeholder.flatten()])[1:].tolist()
    if counts != sizes:
        raise InputError(
            f"the {kind} placeholders in the text are in runs of {counts}, the {kind}s have {sizes} tokens"
        )


def _architectures() -> list[str]:
    return sorted(path.stem for path in ARCHITECTURES.glob("*.json"))


def _config(base: str) -> transformers.Qwen2_5_VLConfig:
    try:
        if base in _architectures():
            config = transformers.Qwen2_5_VLConfig.from_json_file(ARCHITECTURES / f"{base}.json")
        elif base.endswith(".json"):
            config = transformers.Qwen2_5_VLConfig.from_json_file(base)
        else:
            config = transformers.AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise InputError(
            f"base {base!r} is no hub name, folder or config that can be read ({reason}); names without weights: "
            f"{', '.join(_architectures())}"
        ) from None
    if config.model_type != "qwen2_5_vl":
        raise InputError(f"base {base!r} is a {config.model_type!r}; only qwen2_5_vl is supported")
    return config


Stock = TypeVar("Stock", bound=transformers.PreTrainedModel)


def load_weights(kind: type[Stock], base: str, options: Mapping[str, object]) -> Stock:
    """A stock model without its LM head, with every weight from the files.

    Args:
        kind: class of transformers.
        base: hub name or local folder.
        options: of its `from_pretrained`.

    Raises:
        InputError: no such model; weights are missing, of another shape, or left over.
    """
    verbosity, bar = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    # Its report warns of the LM head, which is left out on purpose; what matters is checked below.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model, report = kind.from_pretrained(base, output_loading_info=True, **options)
    except OSError as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"the weights of base {base!r} cannot be loaded ({reason})") from None
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bar:
            transformers.logging.enable_progress_bar()
    missing = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if missing:
        raise InputError(f"base {base!r} lacks {len(missing)} weights, for example {missing[0]}; they would be random")
    surplus = sorted(name for name in report["unexpected_keys"] if "lm_head" not in name.split("."))
    if surplus:
        raise InputError(f"base {base!r} has {len(surplus)} weights that are not used, for example {surplus[0]}")
    return model


def _adapt(model: transformers.Qwen2_5_VLModel, lora: Lora) -> None:
    """Injects the adapters. By full-match pattern: plain names would also hit the tower's MLPs."""
    names = "|".join(re.escape(name) for name in lora.targets)
    pattern = rf"language_model\.layers\.\d+\.(self_attn|mlp)\.({names})"
    settings = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=pattern, bias="none"
    )
    wanted = len(lora.targets) * model.config.text_config.num_hidden_layers
    found = [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)]
    if len(found) != wanted:
        raise InputError(
            f"lora.targets {', '.join(lora.targets)} match {len(found)} of {wanted} layers of the language model"
        )
    if lora.tower:
        blocks = "|".join(re.escape(name) for name in TOWER_TARGETS)
        # One injection: a second one would leave the first without a gradient.
        settings.target_modules = rf"{pattern}|visual\.blocks\.\d+\.({blocks})"
    peft.inject_adapter_in_model(settings, model)
    for name, parameter in model.named_parameters():
        if _is_adapter(name):
            # Adapters of a bfloat16 base train in float32: AdamW's steps at 3e-5 vanish in bfloat16.
            parameter.data = parameter.data.float()
        if parameter.requires_grad != _is_adapter(name):
            raise RuntimeError(f"{name} should {'train' if _is_adapter(name) else 'be frozen'}")


def _is_adapter(name: str) -> bool:
    return ".lora_" in name


def _fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            return "meta"
        values = parameter.detach().flatten()
        values = values[:: max(1, -(-len(values) // 4096))]
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + values.float().cpu().numpy().tobytes())
    return digest.hexdigest()
