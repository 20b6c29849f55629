"""How published multimodal language models are used as embedders: prompt, positions, frames, limits; one record each.

Every record names where its facts stand (`source`) and what they leave open (`unsure`). A prompt is a plain function
from what an item holds to the string that the model reads, so that it can be read beside its source.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from gve.encode.mllm.settings import Settings
from gve.items import InputError
from gve.video import Sampling

Family = Literal["qwen2_vl", "qwen3_vl", "llava_next", "llava_onevision"]
Chat = Callable[[Sequence[Mapping[str, Any]]], str]
"""The chat template of the model's own files: content of one user turn -> prompt with the reply's opening."""


@dataclass(frozen=True)
class Turn:
    """What one prompt is made of.

    Args:
        instruction: of a query; empty for targets.
        text: the item's text.
        media: placeholders of its images and clips, in order.
        kinds: "image" or "video" for each of them.
        chat: see `Chat`.
    """

    instruction: str
    text: str
    media: str
    kinds: tuple[str, ...]
    chat: Chat

    def words(self) -> str:
        """What "Summary above ... in one word" speaks of: a sentence, a video, a sentence and an image, ..."""
        return " and ".join(["sentence"] * bool(self.text or not self.kinds) + list(dict.fromkeys(self.kinds)))


@dataclass(frozen=True)
class Recipe:
    """One published model family.

    Args:
        name: of the adapter.
        family: the architecture, as transformers calls it.
        models: hub names whose weights are used so.
        prompt: what the model reads; the state of its last token is the embedding, after the final norm.
        source: where the facts stand.
        image: what stands for an image in the prompt.
        video: what stands for a clip.
        clips: "video" shows a clip as such, "images" its frames as so many images, for models without clips.
        positions: "mrope" counts vision tokens by time, row and column; "sequential" counts all tokens 0, 1, 2, ...
            because the published code hands no M-RoPE positions to the language model.
        settings: the model's own frames and limits.
        image_px: images are resized to this square first; 0 for not.
        unsure: what could not be established.
    """

    name: str
    family: Family
    models: tuple[str, ...]
    prompt: Callable[[Turn], str]
    source: str
    image: str = "<|vision_start|><|image_pad|><|vision_end|>"
    video: str = "<|vision_start|><|video_pad|><|vision_end|>"
    clips: Literal["video", "images"] = "video"
    positions: Literal["mrope", "sequential"] = "mrope"
    settings: Settings = field(default_factory=Settings)
    image_px: int = 0
    unsure: str = ""


def _sentence(instruction: str, stops: Callable[[str], bool]) -> str:
    """The instruction with a full stop where its last character is none."""
    instruction = instruction.strip()
    return instruction if not instruction or stops(instruction[-1]) else f"{instruction}."


def _joined(*pieces: str) -> str:
    return " ".join(piece for piece in pieces if piece)


def _qwen(system: str, user: str, reply: str = "") -> str:
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n{reply}"


def _chat(turn: Turn) -> str:
    return _qwen("You are a helpful assistant.", turn.media + _joined(turn.instruction, turn.text))


def _gme(turn: Turn) -> str:
    system = _sentence(turn.instruction, lambda last: last == ".") or "You are a helpful assistant."
    return _qwen(system, turn.media + turn.text, "<|endoftext|>")


def _qwen3_embedding(turn: Turn) -> str:
    system = _sentence(turn.instruction, lambda last: unicodedata.category(last).startswith("P"))
    return _qwen(system or "Represent the user's input.", turn.media + turn.text or "NULL")


def _unite(turn: Turn) -> str:
    user = f"{turn.media}{turn.text}\nSummary above {turn.words()} in one word:"
    return _qwen("You are a helpful assistant.", user, "<|endoftext|>")


def _vlm2vec(turn: Turn) -> str:
    request = turn.instruction
    if not request and not turn.text:
        shown = (
            "Understand the content of the provided video." if "video" in turn.kinds else "Represent the given image."
        )
        request = shown if turn.kinds else ""
    return _joined(turn.media, request, turn.text)


def _b3(turn: Turn) -> str:
    request = _vlm2vec(Turn(turn.instruction, turn.text, "", turn.kinds, turn.chat))
    return f"{turn.media}\n{request}" if turn.media else request


def _unime_onevision(turn: Turn) -> str:
    text = _joined(turn.instruction if turn.text else "", turn.text)
    request = f"{text}\n" * bool(text) + f"Summary above {turn.words()} in one word:\n"
    return turn.chat([*({"type": kind} for kind in turn.kinds), {"type": "text", "text": request}])


def _unime_llava(turn: Turn) -> str:
    shown = [turn.media] * bool(turn.media) + [turn.text] * bool(turn.text)
    return "[INST] " + "\n".join([*shown, f"Summary above {turn.words()} in one word: [/INST]"])


def _bge_vl(turn: Turn) -> str:
    head = f"[INST] \n <instruct> {turn.instruction} <query> " if turn.instruction else "[INST] "
    return head + f" {turn.text} \n" * bool(turn.text) + f" {turn.media}" * bool(turn.media) + " [/INST]"


_SHOWN_AS_TRAINED = "the prompt for clips is published for images alone; clips are shown in the same way"

RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "gme",
            "qwen2_vl",
            ("Alibaba-NLP/gme-Qwen2-VL-2B-Instruct", "Alibaba-NLP/gme-Qwen2-VL-7B-Instruct"),
            _gme,
            "gme_inference.py of the model's repository (also in TIGER-AI-Lab/VLM2Vec, baseline_backbone/gme, and mteb "
            "gme_v_models.py): the system turn is the instruction, `<|endoftext|>` is pooled, the decoder is called "
            "without positions; 4 to 1280 tokens an image, 1800 tokens",
            positions="sequential",
            settings=Settings(max_image_tokens=1280, max_length=1800),
            unsure=f"{_SHOWN_AS_TRAINED}, where MMEB-V2 gave it the middle frame alone",
        ),
        Recipe(
            "unite",
            "qwen2_vl",
            (
                "friedrichor/Unite-Base-Qwen2-VL-2B",
                "friedrichor/Unite-Base-Qwen2-VL-7B",
                "friedrichor/Unite-Instruct-Qwen2-VL-2B",
                "friedrichor/Unite-Instruct-Qwen2-VL-7B",
            ),
            _unite,
            "friedrichor/UNITE: inference/inference_demo.py and modeling_unite.py (decoder called without positions), "
            "unite/prompt_template.py; images of 256 to 1280 tokens, clips of at most 360 x 420 px a frame",
            positions="sequential",
            settings=Settings(min_frame_tokens=128, max_frame_tokens=192, min_image_tokens=256, max_image_tokens=1280),
            unsure="instructions are left out, as the demo has none; its own video results take 16, 32 or 48 frames",
        ),
        Recipe(
            "vlm2vec-v2",
            "qwen2_vl",
            ("VLM2Vec/VLM2Vec-V2.0",),
            _vlm2vec,
            "TIGER-AI-Lab/VLM2Vec: src/model/processor.py process_input_text, src/data/eval_dataset/msrvtt_dataset.py, "
            "experiments/public/eval/video.yaml (8 frames): no chat template and no vision_start, so that its "
            "get_rope_index finds no vision and counts every token; 4 to 1280 tokens an image",
            image="<|image_pad|>",
            video="<|video_pad|>",
            positions="sequential",
            settings=Settings(max_frame_tokens=1280, max_image_tokens=1280, max_length=32768),
        ),
        Recipe(
            "b3",
            "qwen2_vl",
            ("raghavlite/B3_Qwen2_2B", "raghavlite/B3_Qwen2_7B"),
            _b3,
            "raghavlite/B3: eval_mmeb.py and src/data/dataset/mmeb_dataset.py over the prompts of MMEB (an image, a "
            "line break, the request), src/model/model.py (VLM2Vec's; last token)",
            image="<|image_pad|>",
            video="<|video_pad|>",
            positions="sequential",
            settings=Settings(max_image_tokens=1280, max_length=32768),
            unsure=_SHOWN_AS_TRAINED,
        ),
        Recipe(
            "qwen3-vl-embedding",
            "qwen3_vl",
            ("Qwen/Qwen3-VL-Embedding-2B", "Qwen/Qwen3-VL-Embedding-8B"),
            _qwen3_embedding,
            "QwenLM/Qwen3-VL-Embedding: src/models/qwen3_vl_embedding.py: instruction in the system turn, last token, "
            "1 frame a second up to 64, images of 4 to 1800 tokens, 8192 tokens; the time of each grid step is written "
            "before it",
            video="<|vision_start|><|video_pad|><|vision_end|>",
            settings=Settings(
                sampling=Sampling.every(1.0, 64),
                min_frame_tokens=128,
                max_frame_tokens=768,
                max_image_tokens=1800,
            ),
            unsure="its script shares one pixel budget between a clip's frames; here each frame has its own limit",
        ),
        Recipe(
            "bge-vl",
            "llava_next",
            (
                "BAAI/BGE-VL-MLLM-S1",
                "BAAI/BGE-VL-MLLM-S2",
                "BAAI/BGE-VL-v1.5-zs",
                "BAAI/BGE-VL-v1.5-mmeb",
                "JUNJIE99/MMRet-MLLM-S1",
                "JUNJIE99/MMRet-MLLM-S2",
            ),
            _bge_vl,
            "modeling_llavanext_for_embedding.py of BAAI/BGE-VL-MLLM-S1 (data_process, prepare_text_input): images "
            "squeezed to 512 px, last token after the final norm",
            image="<image>",
            video="<image>",
            clips="images",
            image_px=512,
            unsure="not made for clips: each frame is one image of one tile (576 tokens), as several images in any "
            "resolution would pass 8192 tokens; the v1.5 files were not seen, S1's prompt is used",
        ),
        Recipe(
            "unime",
            "llava_onevision",
            ("DeepGlint-AI/UniME-LLaVA-OneVision-7B",),
            _unime_onevision,
            "deepglint/UniME README (Summary above ... in one word) and the released model's usage with "
            "apply_chat_template, as third-party wrappers of the card repeat it; last token, left padding",
            image="<image>",
            video="<video>",
            unsure=f"{_SHOWN_AS_TRAINED} (196 tokens a frame); the words for mixed items, and where their instruction "
            "stands, are ours",
        ),
        Recipe(
            "unime-llava-1.6",
            "llava_next",
            ("DeepGlint-AI/UniME-LLaVA-1.6-7B",),
            _unime_llava,
            "deepglint/UniME README and self_evaluate/retrieval_self.py: prompt of model llava_16, last token",
            image="<image>",
            video="<image>",
            clips="images",
            unsure="not made for clips: each frame is one image of one tile; instructions are left out",
        ),
        Recipe("qwen2-vl", "qwen2_vl", (), _chat, "the base models' chat template; nothing was trained to embed"),
        Recipe("qwen3-vl", "qwen3_vl", (), _chat, "the base models' chat template; nothing was trained to embed"),
    )
}

_ALIASES = {"unite_qwen2_vl": "qwen2_vl"}  # what UNITE's code writes into config.json


def family_of(model_type: str) -> str:
    """The architecture behind a config.json's `model_type`; empty where none of the recipes runs it."""
    family = _ALIASES.get(model_type, model_type)
    return family if any(recipe.family == family for recipe in RECIPES.values()) else ""


def recipe_named(name: str) -> Recipe | None:
    """The recipe of a hub name or of a folder that is called like one; None for others."""

    def plain(name: str) -> str:
        return name.rstrip("/").split("/")[-1].lower().replace("_", "-")

    for recipe in RECIPES.values():
        if plain(name) in map(plain, recipe.models):
            return recipe
    return None


def untrained_recipe(name: str, model_type: str) -> Recipe:
    """The recipe of an architecture's base models, for a model that no record names.

    Raises:
        InputError: the architecture has none; says which recipes could be meant.
    """
    family = family_of(model_type)
    known = [recipe.name for recipe in RECIPES.values() if recipe.family == family]
    for recipe in RECIPES.values():
        if recipe.family == family and not recipe.models:
            return recipe
    raise InputError(f"model {name!r} is a {model_type}: say how it is used with --adapter {' or '.join(known)}")
