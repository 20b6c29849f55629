"""What a run costs, by hand formulas: parameters, floating-point operations and memory of Qwen2.5-VL with LoRA.

No weights and no GPU: everything follows from the sizes in a config.json. The counts of parameters, operations and
kept activations are proved in tests against the real model (parameters on the meta device, operations by torch's
counter, activations by hooks on what autograd saves); times are these counts divided by an assumed speed.

Notation: H hidden size, K width of keys and values, I width of the MLP, h and i those of the tower, D embedding.
One multiply and one add are two operations.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gve.items import InputError

ARCHITECTURES = Path(__file__).parent.parent / "model" / "architectures"

FLOAT32 = 4
"""Bytes of one float32 number."""


@dataclass(frozen=True)
class Architecture:
    """The sizes of a Qwen2.5-VL that its cost depends on.

    Args:
        hidden, layers, heads, kv_heads, mlp, vocab: of the language model.
        vision_hidden, vision_layers, vision_mlp: of the tower.
        patch_values: numbers of one patch: 3 channels x temporal patch x patch x patch.
        merge: patches that become one token, along each side.
        window: side of the tower's attention windows, in merged tokens.
        full_layers: tower layers that attend to a whole grid step; the others only inside windows.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int
    vision_hidden: int
    vision_layers: int
    vision_mlp: int
    patch_values: int
    merge: int
    window: int
    full_layers: int

    @classmethod
    def of(cls, base: str) -> Architecture:
        """The sizes of a base, without touching the network.

        Args:
            base: folder, config file, named architecture, or a hub name that ends like "Qwen2.5-VL-3B-Instruct".

        Raises:
            InputError: its config cannot be found or is not one of a Qwen2.5-VL.
        """
        path = config_file(base)
        try:
            values = json.loads(path.read_text())
            # Files of transformers 4 keep the language model's sizes at the top.
            text, vision = values.get("text_config") or values, values["vision_config"]
            return cls(
                hidden=text["hidden_size"],
                layers=text["num_hidden_layers"],
                heads=text["num_attention_heads"],
                kv_heads=text["num_key_value_heads"],
                mlp=text["intermediate_size"],
                vocab=text["vocab_size"],
                vision_hidden=vision["hidden_size"],
                vision_layers=vision["depth"],
                vision_mlp=vision["intermediate_size"],
                patch_values=3 * vision["temporal_patch_size"] * vision["patch_size"] ** 2,
                merge=vision["spatial_merge_size"],
                window=vision["window_size"] // vision["patch_size"] // vision["spatial_merge_size"],
                full_layers=len(vision["fullatt_block_indexes"]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is no config of a Qwen2.5-VL ({error!r})") from error

    @property
    def kv(self) -> int:
        """K: width of the keys, and of the values."""
        return self.hidden // self.heads * self.kv_heads

    def adapted(self, target: str) -> tuple[int, int]:
        """(inputs, outputs) of one linear layer of a decoder layer, by the name LoRA knows it by.

        Raises:
            InputError: there is no such layer.
        """
        wide, narrow, mlp = self.hidden, self.kv, self.mlp
        shapes = {
            "q_proj": (wide, wide),
            "k_proj": (wide, narrow),
            "v_proj": (wide, narrow),
            "o_proj": (wide, wide),
            "gate_proj": (wide, mlp),
            "up_proj": (wide, mlp),
            "down_proj": (mlp, wide),
        }
        if target not in shapes:
            raise InputError(f"lora.targets has {target!r}: a decoder layer has {', '.join(shapes)}")
        return shapes[target]

    def parameters(self) -> dict[str, int]:
        """Parameters of "tower", "embedding" and "decoder"; the LM head is not part of the model."""
        h, i, wide = self.vision_hidden, self.vision_mlp, self.vision_hidden * self.merge**2
        block = 4 * h * h + 4 * h + 3 * h * i + 2 * i + h + 2 * h  # attention, MLP and their biases, two norms
        merger = h + wide * wide + wide + wide * self.hidden + self.hidden
        layer = sum(a * b for a, b in map(self.adapted, ("q_proj", "k_proj", "v_proj", "o_proj", *_MLP)))
        layer += self.hidden + 2 * self.kv + 2 * self.hidden  # biases of q, k, v; two norms
        return {
            "tower": self.patch_values * h + self.vision_layers * block + merger,
            "embedding": self.vocab * self.hidden,
            "decoder": self.layers * layer + self.hidden,
        }

    def lora_parameters(self, rank: int, targets: Sequence[str]) -> int:
        """Parameters that train: r (in + out) for each adapted layer."""
        return self.layers * rank * sum(sum(self.adapted(target)) for target in targets)


_ATTENTION, _MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


def config_file(base: str) -> Path:
    """Where the config.json of a base lies on this machine.

    Raises:
        InputError: nowhere; says what would do.
    """
    if base.endswith(".json"):
        return Path(base)
    if (Path(base) / "config.json").is_file():
        return Path(base) / "config.json"
    sizes = re.search(r"qwen2[._]?5[-_]vl[-_](\d+)b", base, re.IGNORECASE)
    named = ARCHITECTURES / f"qwen2_5_vl_{sizes.group(1)}b.json" if sizes else ARCHITECTURES / f"{base}.json"
    if not named.is_file():
        known = ", ".join(sorted(path.stem for path in ARCHITECTURES.glob("*.json")))
        raise InputError(f"base {base!r} is no folder with a config.json and none of {known}: give model.base")
    return named


@dataclass(frozen=True)
class Sequences:
    """Inputs of one forward pass of the language model on one rank.

    Args:
        count: rows of the batch; a mean need not be whole.
        length: tokens of each row, padding included.
    """

    count: float
    length: float

    @property
    def tokens(self) -> float:
        return self.count * self.length


@dataclass(frozen=True)
class Pictures:
    """Distinct images or clips that the tower sees on one rank in one step, all of one grid.

    Args:
        count: how many; a mean need not be whole.
        grid: (t, h, w) in patches.
    """

    count: float
    grid: tuple[int, int, int]

    @property
    def patches(self) -> float:
        return self.count * self.grid[0] * self.grid[1] * self.grid[2]


@dataclass(frozen=True)
class Training:
    """How the step is run.

    Args:
        rank: of LoRA; 0 trains nothing.
        targets: layers that LoRA adapts.
        dropout: whether LoRA drops inputs.
        dtype_bytes: of the base's weights and of the activations: 2 for bfloat16, 4 for float32.
        checkpointing: decoder layers (all but the last) are computed again in backward.
        chunk_tokens: GradCache: most tokens of a chunk, and of a call of the tower; 0 for the whole batch at once.
        loss_tile: columns of cosines that exist at a time; 0 for all.
        shards: processes over which FSDP divides weights, gradients and optimizer state; 1 for DDP.
        optimizer_shards: the same for the optimizer state and gradients alone (ZeRO-2).
    """

    rank: int = 16
    targets: tuple[str, ...] = (*_ATTENTION[:3], *_MLP)
    dropout: bool = True
    dtype_bytes: int = 2
    checkpointing: bool = True
    chunk_tokens: int = 0
    loss_tile: int = 0
    shards: int = 1
    optimizer_shards: int = 1


def tower_flops(sizes: Architecture, pictures: Pictures) -> dict[str, float]:
    """Operations of the tower, forward only: it is frozen and runs once per distinct picture.

    "linear": per patch and block 2 (4 h^2 + 3 h i), patch embedding and merger. "attention": per patch and block 4 S h,
    where S is the patches attended to: those of the window, or of the whole grid step in the full layers.
    """
    t, height, width = pictures.grid
    h, i, wide = sizes.vision_hidden, sizes.vision_mlp, sizes.vision_hidden * sizes.merge**2
    linear = 2 * pictures.patches * (sizes.patch_values * h + sizes.vision_layers * (4 * h * h + 3 * h * i))
    merger = 2 * pictures.patches / sizes.merge**2 * (wide * wide + wide * sizes.hidden)
    # Pairs of patches that see each other in a grid step: windows are cut at the edges.
    rows, columns = (_squares(side // sizes.merge, sizes.window) for side in (height, width))
    inside, everywhere = sizes.merge**4 * rows * columns, (height * width) ** 2
    seen = sizes.full_layers * everywhere + (sizes.vision_layers - sizes.full_layers) * inside
    return {"linear": linear + merger, "attention": 4.0 * h * pictures.count * t * seen}


def _squares(side: int, window: int) -> int:
    """Sum of squares of the pieces that a side is cut into."""
    return side // window * window**2 + (side % window) ** 2


def decoder_flops(sizes: Architecture, batch: Sequences, how: Training) -> dict[str, float]:
    """Operations of one forward pass of the language model, by part.

    "linear": 2 x parameters of the linear layers per token; the last layer's MLP runs on the pooled tokens only.
    "lora": 2 r (in + out) per token and adapted layer. "attention": scores and mixing under a causal kernel, which
    skips the masked half: 2 L H per token and layer.
    """
    total = {"linear": 0.0, "lora": 0.0, "attention": 2 * batch.length * sizes.hidden * batch.tokens * sizes.layers}
    for name in (*_ATTENTION, *_MLP):
        tokens = batch.tokens * sizes.layers
        if name in _MLP:
            tokens = batch.tokens * (sizes.layers - 1) + batch.count
        inputs, outputs = sizes.adapted(name)
        total["linear"] += 2 * tokens * inputs * outputs
        if how.rank and name in how.targets:
            total["lora"] += 2 * tokens * how.rank * (inputs + outputs)
    return total


def step_flops(
    sizes: Architecture, batches: Sequence[Sequences], pictures: Sequence[Pictures], how: Training
) -> dict[str, float]:
    """Operations of one training step on one rank, by part.

    "tower" forward only. "forward" as `decoder_flops`. "backward": a frozen linear layer passes its gradient on, as
    much as its forward; LoRA twice its forward; attention 2.5 times (the kernel computes the scores again). Without
    checkpointing nothing goes back past q, k and v of the first layer. "recompute": what checkpointing runs again, all
    layers but the last. "cached": the first pass of GradCache. The loss and element-wise work are left out.
    """
    parts = {"tower": 0.0, "forward": 0.0, "backward": 0.0, "recompute": 0.0, "cached": 0.0}
    parts["tower"] = sum(total(tower_flops(sizes, each)) for each in pictures)
    for batch in batches:
        forward = decoder_flops(sizes, batch, how)
        parts["forward"] += total(forward)
        if not how.rank:
            continue
        parts["backward"] += forward["linear"] + 2 * forward["lora"] + 2.5 * forward["attention"]
        if how.checkpointing:
            last = decoder_flops(replace(sizes, layers=1), batch, how)
            parts["recompute"] += total(forward) - total(last)
        else:
            inputs = [sizes.adapted(name) for name in _ATTENTION[:3]]
            parts["backward"] -= 2 * batch.tokens * sum(a * b for a, b in inputs)
            parts["backward"] -= (
                2 * batch.tokens * how.rank * sizes.hidden * len(set(_ATTENTION[:3]) & set(how.targets))
            )
        if how.chunk_tokens:
            parts["cached"] += total(forward)
    return parts


def layer_bytes(sizes: Architecture, how: Training) -> tuple[int, int]:
    """Bytes per token that autograd keeps of one decoder layer with a fused kernel: (attention half, MLP half).

    With b for `dtype_bytes`. Attention half: b (2 H + 2 K) for q, k, v and the output, 4 for each head's sum of
    exponentials. MLP half: b 3 I for gate, its activation and up. Both: the norm's float32 input and its scale,
    4 (H + 1), and LoRA's inputs: one of b in for all layers that read the same, or under dropout for each layer its own
    dropped input and mask, (b + 1) in; b r for each between its two factors.
    """
    b = how.dtype_bytes
    halves = []
    for names, rest in (
        (_ATTENTION, b * (2 * sizes.hidden + 2 * sizes.kv) + FLOAT32 * sizes.heads),
        (_MLP, b * 3 * sizes.mlp),
    ):
        adapted = [name for name in names if how.rank and name in how.targets]
        alone = [name for name in adapted if how.dropout or name in ("o_proj", "down_proj")]
        inputs = (b + how.dropout) * sum(sizes.adapted(name)[0] for name in alone)
        inputs += b * sizes.hidden * (len(adapted) > len(alone))
        halves.append(FLOAT32 * (sizes.hidden + 1) + rest + inputs + b * how.rank * len(adapted))
    return halves[0], halves[1]


def kept_bytes(sizes: Architecture, tokens: float, how: Training) -> float:
    """Bytes that autograd keeps of a forward pass over so many tokens of the language model.

    Without checkpointing all layers, less the last MLP, which runs on the pooled tokens only; with it the inputs of all
    layers but the last and that one's attention half. Both: the rotation's two tables, the final norm's float32 input.
    """
    attention, mlp = layer_bytes(sizes, how)
    layers = sizes.layers * attention + (sizes.layers - 1) * mlp
    if how.checkpointing:
        layers = how.dtype_bytes * sizes.hidden * (sizes.layers - 1) + attention
    return tokens * (layers + 2 * how.dtype_bytes * sizes.hidden // sizes.heads + FLOAT32 * sizes.hidden)


def step_memory(
    sizes: Architecture,
    batches: Sequence[Sequences],
    pictures: Sequence[Pictures],
    how: Training,
    *,
    pairs: int,
    world: int,
) -> dict[str, float]:
    """Peak GPU memory of one rank in a step of one source, in bytes by part; "peak" is the sum at the worst moment.

    "weights": the frozen base. "trained": LoRA in float32 with gradient and AdamW's two moments, 16 bytes each, 4 more
    for DDP's buckets, and 4 for the sums of GradCache. "pixels": the step's patches in float32. "features": the tower's
    merged tokens. "tower": what its widest moment holds (freed before the language model runs). "activations": what
    backward needs: everything without checkpointing, else the input of each layer and one layer at a time; with
    GradCache only those of one chunk. "logits": local rows x gathered columns (or the columns of a tile), both
    directions, with what backward keeps: 32 bytes an entry. CUDA's own context, the gradients of activations in flight
    and the allocator's fragmentation are not counted.
    """
    trained = sizes.lora_parameters(how.rank, how.targets) if how.rank else 0
    split = max(how.shards, how.optimizer_shards)
    b = how.dtype_bytes
    patches = sum(each.patches for each in pictures)
    h, i = sizes.vision_hidden, sizes.vision_mlp
    # In a block: residual and normed input beside either qkv with rotated float32 copies, or the MLP's three widths.
    widest = max(b * (2 * h + 3 * h) + FLOAT32 * 4 * h, b * (2 * h + 3 * i))
    tokens = sum(batch.tokens for batch in batches)
    largest = max((batch.tokens for batch in batches), default=0.0)
    seen, columns = patches, pairs * world
    if how.chunk_tokens:
        tokens, largest = min(tokens, how.chunk_tokens), min(largest, how.chunk_tokens)
        seen = min(patches, how.chunk_tokens * sizes.merge**2)
    if how.loss_tile:
        columns = min(columns, how.loss_tile)
    activations = kept_bytes(sizes, tokens, how)
    if how.checkpointing:
        activations += largest * sum(layer_bytes(sizes, how))
    parts = {
        "weights": sum(sizes.parameters().values()) * b / how.shards,
        "trained": trained
        * (FLOAT32 / how.shards + 12 / split + FLOAT32 * ((split == 1 < world) + bool(how.chunk_tokens))),
        "pixels": FLOAT32 * patches * sizes.patch_values,
        "features": b * patches / sizes.merge**2 * sizes.hidden,
        "tower": seen * (widest + b * sizes.patch_values),
        "activations": activations if how.rank else 0.0,
        "logits": 32.0 * pairs * columns,
    }
    held = parts["weights"] + parts["trained"] + parts["pixels"] + parts["features"]
    parts["peak"] = held + max(parts["tower"], parts["activations"] + parts["logits"])
    return parts


def checkpoint_bytes(sizes: Architecture, how: Training) -> int:
    """A checkpoint: the trained weights and AdamW's two moments in float32; the base is only named."""
    return 3 * FLOAT32 * sizes.lora_parameters(how.rank, how.targets) if how.rank else 0


def total(parts: Mapping[str, float]) -> float:
    """Sum of all parts."""
    return sum(parts.values())


def lora_of(settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """The fields of Training that a model.lora record decides."""
    if settings is None:
        return {"rank": 0, "targets": (), "dropout": False}
    return {"rank": settings["rank"], "targets": tuple(settings["targets"]), "dropout": settings["dropout"] > 0}
