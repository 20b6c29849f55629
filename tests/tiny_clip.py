"""Dual encoders of the real classes with two layers, saved as the hub has them: weights, tokenizer, image processor."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from gve.items import Frames

SIDE, LENGTH, DIM = 32, 12, 16
SENTENCES = ("a red circle moves left then right", "a blue square stays", "two green stars turn around each other")
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 160,
    "max_position_embeddings": LENGTH,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "initializer_factor": 5.0,  # large enough that words, padding and frames show in the vectors
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 16,
    "projection_dim": DIM,
    "initializer_factor": 5.0,
}


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Byte pairs with a start and an end token, as CLIP's, of at most 12 positions."""
    pairs = Tokenizer(models.BPE(unk_token="<unk>"))
    pairs.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<unk>", "<pad>", "<s>", "</s>"]
    pairs.train_from_iterator(SENTENCES, trainers.BpeTrainer(special_tokens=special, vocab_size=TEXT["vocab_size"]))
    pairs.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=pairs,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=LENGTH,
    )


def write_dual_encoder(folder: Path, model_type: str, *, processor: bool = True) -> str:
    """A folder of one architecture with random weights; without an image processor if asked."""
    square = {"height": SIDE, "width": SIDE}
    if model_type == "siglip2":  # patches of any shape instead of square pictures
        vision = {**VISION, "num_patches": 16, "patch_size": 8}
        images = transformers.Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16)
    elif model_type == "siglip":
        vision, images = VISION, transformers.SiglipImageProcessorPil(size=square)
    else:
        vision = VISION
        images = transformers.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=square)
    if model_type == "xclip":
        vision = {
            **vision,
            "num_frames": 4,
            "mit_hidden_size": DIM,
            "mit_intermediate_size": 32,
            "mit_num_hidden_layers": 1,
            "mit_num_attention_heads": 2,
        }
    config = transformers.AutoConfig.for_model(
        model_type, text_config={**TEXT, "projection_size": 32}, vision_config=vision, projection_dim=DIM
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = transformers.AutoModel.from_config(config)
        for value in model.parameters():  # SigLIP's and X-CLIP's own starts make towers that hardly look at their input
            if value.ndim > 1:
                torch.nn.init.normal_(value, std=value.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    if processor:
        images.save_pretrained(folder)
    return str(folder)


def clip(seed: int, count: int = 8) -> Frames:
    """Noise of `count` frames, each of its own tint, 40 x 50."""
    noise = np.random.default_rng(seed)
    tint = noise.integers(0, 200, (count, 1, 1, 3))
    pixels = (tint + noise.integers(0, 55, (count, 40, 50, 3))).astype(np.uint8)
    return Frames(pixels, np.arange(count) / 4.0, np.arange(count), count, 4.0)


def write_video(path: Path, seed: int, count: int = 24) -> Path:
    """A file of 48 x 64, 8 frames a second, whose frames differ."""
    noise = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(count):
            blocks = np.kron(noise.integers(0, 255, (6, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(blocks, format="rgb24")))
        container.mux(stream.encode())
    return path
