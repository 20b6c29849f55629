"""A Qwen2.5-VL of the real class with two layers, its weights large enough that positions and padding show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from gve.items import EmbedBatch

IMAGE, VIDEO, START, END, PAD = 60, 61, 62, 63, 59
CONFIG: dict[str, Any] = {
    "model_type": "qwen2_5_vl",
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "text_config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "bos_token_id": None,
        "eos_token_id": PAD,
        "initializer_range": 0.15,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [1, 1, 2]},
    },
    "vision_config": {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "out_hidden_size": 32,
        "window_size": 56,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
        "initializer_range": 0.15,
    },
}


def write_tiny_base(folder: Path, seed: int = 0) -> str:
    """A folder as the hub has it: weights of the whole ForConditionalGeneration, LM head included."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig(**CONFIG))
    model.save_pretrained(folder)
    return str(folder)


def texts(rows: list[int], spread: int = 0) -> EmbedBatch:
    """Row i says the word i, in 6 to 6 + spread tokens; content ids say so too."""
    lengths = torch.tensor([6 + row * 7 % (spread + 1) for row in rows])
    ids = torch.full((len(rows), int(lengths.max())), 5)
    ids[:, 2] = torch.tensor(rows)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return EmbedBatch(
        input_ids=ids.where(mask.bool(), PAD),
        attention_mask=mask,
        position_ids=torch.arange(ids.shape[1]).where(mask.bool(), 1).expand(3, *ids.shape),
        pool_index=lengths - 1,
        content_ids=torch.tensor(rows),
        valid=torch.ones(len(rows), dtype=torch.bool),
    )


def clips(rows: list[int]) -> EmbedBatch:
    """Row i shows the clip i: 2 grid steps of 2 x 2 patches, one token each."""
    ids = torch.tensor([[1, START, VIDEO, VIDEO, END, 2]] * len(rows))
    seeds = [torch.Generator().manual_seed(row) for row in rows]
    patches = [torch.randint(256, (8, 1176), generator=seed, dtype=torch.uint8) for seed in seeds]
    return EmbedBatch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=torch.arange(6).expand(3, *ids.shape),
        pool_index=torch.full((len(rows),), 5),
        content_ids=torch.tensor(rows) + 1000,
        valid=torch.ones(len(rows), dtype=torch.bool),
        video_patches=torch.cat(patches),
        video_grid=torch.tensor([[2, 2, 2]] * len(rows)),
        video_keys=tuple(str(row) for row in rows),
        video_rows=tuple(range(len(rows))),
    )
