"""Dual encoders for video that transformers does not carry: CLIP with one change in its picture tower.

- LanguageBind-Video (arXiv 2310.01852; PKU-YuanGroup/LanguageBind, languagebind/video/modeling_video.py): every layer
  first attends over time at each place; class tokens of the frames are averaged before the projection.
- ViCLIP (arXiv 2307.06942; OpenGVLab/InternVideo, Data/InternVid/viclip) and VideoCLIP-XL (arXiv 2410.00741,
  alibaba-pai/VideoCLIP-XL): all patches of all frames attend to each other under one class token. Their files keep
  OpenAI's names, and all sizes are read from the tensors. VideoCLIP-XL's text tower has the 248 positions of Long-CLIP.

Both are built from transformers' own CLIP modules; none of the repositories' code is run.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import interpolate
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer
from transformers.utils import cached_file

from gve.items import InputError

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"  # OpenAI's merges, under the name they have everywhere
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "VideoCLIP-XL.bin", "VideoCLIP-XL-v2.bin")
LONG_CLIP_KEPT = 20  # Long-CLIP trains the positions after the first 20 anew and keeps these


class LanguageBindVideoConfig(transformers.CLIPConfig):
    """CLIP's configuration; the picture tower's also has `num_frames` and `add_time_attn`."""

    model_type = "LanguageBindVideo"


class JointClipConfig(transformers.CLIPConfig):
    """CLIP's configuration; the picture tower's also has `num_frames`."""

    model_type = "viclip"


class TimeAttentionLayer(CLIPEncoderLayer):
    """CLIP's layer with attention over time before its own: [B * T, N, D] to the same shape."""

    def __init__(self, config: transformers.CLIPVisionConfig) -> None:
        super().__init__(config)
        self.num_frames = config.num_frames
        self.temporal_embedding = nn.Parameter(torch.zeros(1, config.num_frames, config.hidden_size))
        self.temporal_attn = CLIPAttention(config)
        self.temporal_layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> torch.Tensor:
        rows, places, width = hidden_states.shape
        clips = rows // self.num_frames
        times = hidden_states.view(clips, self.num_frames, places, width).transpose(1, 2).flatten(0, 1)
        times = times + self.temporal_embedding
        times = times + self.temporal_attn(self.temporal_layer_norm1(times), attention_mask=None, **options)[0]
        frames = times.view(clips, places, self.num_frames, width).transpose(1, 2).reshape(rows, places, width)
        return super().forward(frames, attention_mask, **options)


class LanguageBindVideo(transformers.CLIPModel):
    """LanguageBind's video and text towers, in the names of its own weights."""

    config_class = LanguageBindVideoConfig

    def __init__(self, config: LanguageBindVideoConfig) -> None:
        super().__init__(config)
        vision = config.vision_config
        layers = [TimeAttentionLayer(self.vision_model.config) for _ in range(vision.num_hidden_layers)]
        self.vision_model.encoder.layers = nn.ModuleList(layers)
        self.post_init()

    def get_video_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[B, T, 3, H, W] to [B, D]."""
        pooled = self.vision_model(pixel_values.flatten(0, 1)).pooler_output
        return self.visual_projection(pooled.view(*pixel_values.shape[:2], -1).mean(1))


class JointClip(transformers.CLIPModel):
    """ViCLIP's video and text towers, in the names of transformers' CLIP."""

    config_class = JointClipConfig

    def __init__(self, config: JointClipConfig) -> None:
        super().__init__(config)
        vision = config.vision_config
        self.temporal_embedding = nn.Parameter(torch.zeros(1, vision.num_frames, vision.hidden_size))
        self.post_init()

    def get_video_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[B, T, 3, H, W] to [B, D]."""
        clips, frames = pixel_values.shape[:2]
        tower = self.vision_model
        tokens = tower.embeddings(pixel_values.flatten(0, 1))  # [B * T, 1 + N, W], places added
        tokens = tokens.view(clips, frames, *tokens.shape[1:])
        patches = tokens[:, :, 1:] + self.temporal_embedding[:, :, None]
        joint = torch.cat([tokens[:, 0, :1], patches.flatten(1, 2)], 1)
        last = tower.encoder(inputs_embeds=tower.pre_layrnorm(joint)).last_hidden_state
        return self.visual_projection(tower.post_layernorm(last[:, 0]))


@dataclass(frozen=True)
class Bilinear:
    """The pictures of these models: plain bilinear resize of pixels (as OpenCV's, no antialias), then normalisation.

    Args:
        side: of the square that the tower sees, in pixels.
        crop: keep the picture's shape, short side to `side`, and take the middle; else both sides are squeezed.
        mean, std: per channel, of values in [0, 1].
    """

    side: int
    crop: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, frames: Sequence[np.ndarray], **options: Any) -> dict[str, torch.Tensor]:
        """[H, W, 3] uint8 frames to {"pixel_values": [T, 3, side, side] float32}."""
        pixels = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float() / 255
        pixels = (pixels - torch.tensor(self.mean).view(3, 1, 1)) / torch.tensor(self.std).view(3, 1, 1)
        height, width = pixels.shape[2:]
        size = [self.side, self.side]
        if self.crop:  # pytorchvideo's short_side_scale rounds the long side down
            size = [max(self.side, height * self.side // min(height, width)),
                    max(self.side, width * self.side // min(height, width))]  # fmt: skip
        pixels = interpolate(pixels, size, mode="bilinear", align_corners=False)
        top, left = (size[0] - self.side) // 2, (size[1] - self.side) // 2
        return {"pixel_values": pixels[:, :, top : top + self.side, left : left + self.side]}

    def to_json_string(self) -> str:
        return json.dumps(dataclasses.asdict(self))


def load_language_bind(name: str, dtype: torch.dtype) -> tuple[transformers.PreTrainedModel, dict, Any, Bilinear]:
    """(model, transformers' loading report, tokenizer, pictures) of a LanguageBind-Video folder or hub name.

    Raises:
        InputError: a release with LoRA on the time attention, or without time attention.
        OSError, ValueError: files are missing or damaged.
    """
    values, _ = transformers.PretrainedConfig.get_config_dict(name)
    vision = values["vision_config"]
    if vision.get("lora_r"):
        raise InputError(
            f"model {name!r} keeps its time attention as LoRA of rank {vision['lora_r']}; "
            "give a fully fine-tuned release, LanguageBind/LanguageBind_Video_FT or _Video_Huge_V1.5_FT"
        )
    if not vision.get("add_time_attn") or "num_frames" not in vision:
        raise InputError(f"model {name!r} is no LanguageBind of videos: its config has no time attention")
    config = LanguageBindVideoConfig(
        text_config=values["text_config"], vision_config=vision, projection_dim=values.get("projection_dim", 512)
    )
    model, report = LanguageBindVideo.from_pretrained(name, config=config, dtype=dtype, output_loading_info=True)
    pictures = Bilinear(config.vision_config.image_size, True, CLIP_MEAN, CLIP_STD)
    return model, report, transformers.CLIPTokenizer.from_pretrained(name), pictures


def load_joint_clip(name: str, dtype: torch.dtype) -> tuple[transformers.PreTrainedModel, dict, Any, Bilinear]:
    """(model, loading report, tokenizer, pictures) of ViCLIP's or VideoCLIP-XL's files.

    Args:
        name: folder or hub name that holds one of `WEIGHTS` and OpenAI's vocabulary.
        dtype: of the weights.

    Raises:
        InputError: a file is missing, or the weights are of another architecture.
    """
    files = {
        file: cached_file(name, file, _raise_exceptions_for_missing_entries=False) for file in (*WEIGHTS, VOCABULARY)
    }
    weights = next((files[file] for file in WEIGHTS if files[file]), None)
    if weights is None or not files[VOCABULARY]:
        raise InputError(f"model {name!r} needs {VOCABULARY} and one of {', '.join(WEIGHTS)} in its folder")
    state = read_weights(weights)
    config, state = from_openai(state, weights)
    model = JointClip(config).to(dtype)
    report = model.load_state_dict(state, strict=False)
    found = {"missing_keys": report.missing_keys, "mismatched_keys": report.unexpected_keys}
    side = config.vision_config.image_size
    tokenizer = openai_tokenizer(Path(files[VOCABULARY]), config.text_config.vocab_size)
    return model, found, tokenizer, Bilinear(side, False, IMAGENET_MEAN, IMAGENET_STD)


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file, or of a checkpoint of torch read as plain tensors.

    Raises:
        InputError: it holds more than tensors and plain values, or is damaged.
    """
    if str(path).endswith(".safetensors"):
        return load_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError, KeyError):
        raise InputError(f"{path} cannot be loaded as plain tensors") from None
    return state["model"] if isinstance(state.get("model"), Mapping) else state


def from_openai(state: Mapping[str, torch.Tensor], where: str) -> tuple[JointClipConfig, dict[str, torch.Tensor]]:
    """Weights under OpenAI's names to the configuration that they imply and transformers' names.

    Raises:
        InputError: they lack a tower, or the frames' embedding.
    """
    conv = next((key for key in state if key.endswith("conv1.weight") and state[key].ndim == 5), "")
    words = next((key for key in state if key.endswith("token_embedding.weight")), "")
    eyes = conv.removesuffix("conv1.weight")
    text = words.removesuffix("token_embedding.weight")
    times = state.get(f"{eyes}temporal_positional_embedding")
    if not conv or not words or times is None:
        raise InputError(f"{where} holds no ViCLIP or VideoCLIP-XL: a tower or the embedding of frames is missing")
    if state[conv].shape[2] != 1:
        raise InputError(f"{where}: patches of {state[conv].shape[2]} frames, 1 is what ViCLIP was released with")
    out = _tower(state, eyes, "vision_model") | _tower(state, text, "text_model")
    out["temporal_embedding"] = times
    out["vision_model.embeddings.class_embedding"] = state[f"{eyes}class_embedding"]
    out["vision_model.embeddings.patch_embedding.weight"] = state[conv].squeeze(2)
    out["vision_model.embeddings.position_embedding.weight"] = state[f"{eyes}positional_embedding"]
    for own, theirs in (("pre_layrnorm", "ln_pre"), ("post_layernorm", "ln_post")):
        for kind in ("weight", "bias"):
            out[f"vision_model.{own}.{kind}"] = state[f"{eyes}{theirs}.{kind}"]
    positions = state[f"{text}positional_embedding"]
    anew = state.get(f"{text}positional_embedding_res")
    if anew is not None:
        positions = torch.cat([positions[:LONG_CLIP_KEPT], anew[LONG_CLIP_KEPT:]])
    out["text_model.embeddings.token_embedding.weight"] = state[words]
    out["text_model.embeddings.position_embedding.weight"] = positions
    for kind in ("weight", "bias"):
        out[f"text_model.final_layer_norm.{kind}"] = state[f"{text}ln_final.{kind}"]
    out["visual_projection.weight"] = state[f"{eyes}proj"].T
    out["text_projection.weight"] = state[f"{text}text_projection"].T
    patch = state[conv].shape[-1]
    side = round((len(state[f"{eyes}positional_embedding"]) - 1) ** 0.5) * patch
    config = JointClipConfig(
        vision_config=_sizes(out, "vision_model")
        | {"image_size": side, "patch_size": patch, "num_frames": times.shape[1]},
        # The token that is pooled has the largest id; transformers takes that token where the id is given as 2.
        text_config=_sizes(out, "text_model")
        | {"vocab_size": len(state[words]), "max_position_embeddings": len(positions), "eos_token_id": 2},
        projection_dim=out["text_projection.weight"].shape[0],
    )
    return config, {name: value.float() for name, value in out.items()}


_LAYER = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
          "attn.out_proj": "self_attn.out_proj"}  # fmt: skip


def _tower(state: Mapping[str, torch.Tensor], theirs: str, own: str) -> dict[str, torch.Tensor]:
    """The layers of one tower."""
    out = {}
    start = f"{theirs}transformer.resblocks."
    for key, value in state.items():
        if not key.startswith(start):
            continue
        number, name = key.removeprefix(start).split(".", 1)
        layer = f"{own}.encoder.layers.{number}"
        if name.startswith("attn.in_proj_"):
            kind = name.removeprefix("attn.in_proj_")
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                out[f"{layer}.self_attn.{part}_proj.{kind}"] = rows
        else:
            module, kind = name.rsplit(".", 1)
            out[f"{layer}.{_LAYER[module]}.{kind}"] = value
    return out


def _sizes(state: Mapping[str, torch.Tensor], tower: str) -> dict[str, int]:
    """Sizes of a tower by its tensors; heads are 64 wide in all models of OpenAI's layout."""
    inner, width = state[f"{tower}.encoder.layers.0.mlp.fc1.weight"].shape
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_attention_heads": width // 64,
        "num_hidden_layers": sum(name.endswith("mlp.fc1.weight") and name.startswith(tower) for name in state),
    }


def openai_tokenizer(path: Path, vocab_size: int) -> transformers.CLIPTokenizer:
    """CLIP's tokenizer from OpenAI's list of merges, of which the first `vocab_size` - 514 are used.

    Raises:
        InputError: the file is damaged or too short.
    """
    try:
        lines = gzip.decompress(path.read_bytes()).decode().split("\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no list of merges ({error})") from None
    merges = [tuple(line.split()) for line in lines[1 : vocab_size - 514 + 1]]
    if len(merges) != vocab_size - 514 or any(len(pair) != 2 for pair in merges):
        raise InputError(f"{path} has {len(merges)} merges, the model needs {vocab_size - 514}")
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=merges)
