"""The tiny base: the real Qwen2.5-VL class with 2.5M parameters, and a small BPE tokenizer with Qwen's special tokens.

The package carries one that was trained by next-token answers and captions (`gve.toy.pretraining`), as a hub folder
(config.json, model.safetensors in float16, tokenizer files, preprocessor_config.json), loaded by the same path as a
released model.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.utils import logging

from gve.items import InputError
from gve.toy.language import DIALECTS

EMBEDDED = Path(__file__).parent / "weights"
"""The base that the package carries, as a hub folder (experiments/0001-toy-base)."""
SUMS = "SHA256SUMS"
WIDTH = 192
LAYERS = 4  # of the language model
TOWER_WIDTH = 128
TOWER_LAYERS = 3
# With the released 1e6 and thirds, rows and columns of a 3 x 3 grid are turned by angles below 0.03, and the language
# model hardly tells one cell from the next; with a small theta all frequencies turn, and none is left to match words by
# meaning wherever they stand. This lies between, and gives rows and columns the faster part of what is slow.
ROPE_THETA = 1000.0
MROPE_SECTION = (2, 3, 11)  # frequencies of time, rows and columns
VOCABULARY = 768  # byte tokens, merges and special tokens together, at most
# The special tokens of Qwen2.5, in their order; ids follow the vocabulary, as in the real one.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PREPROCESSOR = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
}
TEMPLATE = ("system\nYou are a helpful assistant.", "user\n", "assistant\n")
TEMPLATE_WEIGHT = 2000  # the template stands in every input, and each of its tokens costs a step's time: whole words


def train_tokenizer(texts: Iterable[str]) -> Qwen2Tokenizer:
    """A byte-level BPE over the texts, split as Qwen2 splits; any other text falls back to bytes and stays lossless."""
    qwen = Qwen2Tokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE())
    learner.normalizer, learner.pre_tokenizer, learner.decoder = qwen.normalizer, qwen.pre_tokenizer, qwen.decoder
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learner.train_from_iterator([*texts, *_words_of_dialects(), *TEMPLATE * TEMPLATE_WEIGHT], trainer)
    learner.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    return Qwen2Tokenizer(
        tokenizer_object=learner,
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        chat_template=CHAT_TEMPLATE,
        model_max_length=32768,
    )


def _words_of_dialects() -> list[str]:
    """Every word of both dialects: a base knows the words of dialect B, which adapters are never trained on."""
    books = [b for d in DIALECTS.values() for b in (d.verbs, d.moves, d.themes, d.shapes, d.colors, d.sizes)]
    return [f" {phrase}" for book in books for phrase in book.values() if phrase]


def tiny_config(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLConfig:
    """Configuration of the tiny base for a tokenizer: all constants of the real model but its sizes."""
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad")}
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": math.ceil(len(tokenizer) / 64) * 64,
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "initializer_range": round(WIDTH**-0.5, 4),
            "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA, "mrope_section": list(MROPE_SECTION)},
            "tie_word_embeddings": True,
            "bos_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": TOWER_LAYERS,
            "hidden_size": TOWER_WIDTH,
            "intermediate_size": 2 * TOWER_WIDTH,
            "num_heads": 4,
            "out_hidden_size": WIDTH,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": 112,
            "fullatt_block_indexes": list(range(TOWER_LAYERS)),
            "initializer_range": round(TOWER_WIDTH**-0.5, 4),
        },
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )


def random_base(config: Qwen2_5_VLConfig, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """A base with random weights, in float32.

    The published initialisation (0.02 everywhere) is made for widths of thousands; at width 192 it leaves the output
    of every layer far below its input, and a frozen tower hardly sees. Each matrix is drawn with variance 1 / fan-in
    instead, and embeddings with variance 1 / width.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv3d)):
                fan_in = module.weight[0].numel()
                nn.init.normal_(module.weight, std=fan_in**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
        model.tie_weights()
    return model.eval()


def write_base(folder: Path, texts: Iterable[str], seed: int = 0) -> Qwen2Tokenizer:
    """Write the tiny base to `folder` as a hub repository and return its tokenizer."""
    tokenizer = train_tokenizer(texts)
    save_base(folder, random_base(tiny_config(tokenizer), seed), tokenizer)
    return tokenizer


def write_sums(folder: Path) -> None:
    """Writes SHA256SUMS, in the format of sha256sum, of every file of a base."""
    files = sorted(file for file in folder.iterdir() if file.suffix in (".json", ".jinja", ".safetensors"))
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files]
    (folder / SUMS).write_text("".join(lines))


def check_embedded() -> None:
    """Compares the embedded base with its SHA256SUMS.

    Raises:
        InputError: a file is missing or of other bytes.
    """
    for line in (EMBEDDED / SUMS).read_text().splitlines():
        expected, name = line.split("  ")
        file = EMBEDDED / name
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != expected:
            raise InputError(f"{file} is not the file that the package was made with: install gve again")


def copy_base(folder: Path) -> None:
    """Writes the embedded base to `folder` as a hub folder.

    Raises:
        InputError: the embedded files are not those of their checksums.
    """
    check_embedded()
    shutil.copytree(EMBEDDED, folder, dirs_exist_ok=True)


def random_twin(folder: Path, seed: int = 0) -> None:
    """Writes a base of the embedded one's architecture and tokenizer, with random weights."""
    config = Qwen2_5_VLConfig.from_pretrained(EMBEDDED)
    save_base(folder, random_base(config, seed), Qwen2Tokenizer.from_pretrained(EMBEDDED))


def save_base(folder: Path, model: Qwen2_5_VLForConditionalGeneration, tokenizer: Qwen2Tokenizer) -> None:
    """Writes a hub folder: config, weights, tokenizer and preprocessor."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    logging.disable_progress_bar()  # one file of 6 MB
    model.save_pretrained(folder)
    logging.enable_progress_bar()
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n")
