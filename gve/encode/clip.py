"""Dual encoders (CLIP and its kin): one tower for texts, one for pictures, one space.

A clip is the mean of its frames' unit vectors, brought to unit length again: parameter-free pooling as CLIP4Clip's
`meanP` (arXiv 2104.08860, its code: modules/modeling.py, _loose_similarity), unless the model has a pooling of its own
(X-CLIP, LanguageBind, ViCLIP, VideoCLIP-XL). An image is one frame, shown as often as such a model needs. An item of
several parts is the mean of its parts' unit vectors, because none of these models was trained on mixed items (MTEB's
wrappers add the parts as well). Instructions are left out: the text towers never saw one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from torch.nn.functional import normalize

from gve.encode.decoding import Decoding, fingerprint_of, weights_hash
from gve.encode.encoder import Encoded, Transform, progress_bar
from gve.encode.video_clip import load_joint_clip, load_language_bind
from gve.items import Frames, InputError, Item, Video
from gve.video import Sampling

UVRB_FRAMES = Sampling.uniform(8)  # what the benchmark shows every model


@dataclass(frozen=True)
class Usage:
    """How the models of one architecture are used, as they were published.

    Args:
        text_padding: "longest" pads a batch to its longest text; "max_length" pads every text to the tower's positions,
            where the model was trained so.
        clip: "mean" of unit frame vectors, or the "model" pools the frames itself and wants a fixed count of them.
        source: where these facts stand.
        unsure: what could not be established.
    """

    text_padding: Literal["longest", "max_length"]
    clip: Literal["mean", "model"]
    source: str
    unsure: str = ""


FAMILIES: Mapping[str, Usage] = {
    "clip": Usage(
        "longest",
        "mean",
        "model cards of openai/clip-vit-* and Searchium-ai/clip4clip-webvid150k; CLIP4Clip modules/modeling.py: unit "
        "frames, mean, unit length",
        "CLIP4Clip's own evaluation takes 1 frame a second, at most 12, and texts of 32 tokens",
    ),
    "metaclip_2": Usage(
        "longest", "mean", "transformers docs, MetaCLIP 2", "published for images; frames as in CLIP4Clip"
    ),
    "siglip": Usage(
        "max_length",
        "mean",
        "transformers docs, SigLIP: texts are padded to max_length, as in training",
        "published for images; frames as in CLIP4Clip",
    ),
    "siglip2": Usage(
        "max_length",
        "mean",
        "transformers Siglip2Processor: texts padded and cut to 64 tokens",
        "published for images; frames as in CLIP4Clip",
    ),
    "xclip": Usage(
        "longest",
        "model",
        "transformers docs, X-CLIP: get_video_features over vision_config.num_frames frames; MTEB's wrapper",
        "its text prompts that look at the video need the pair at once, so they are left out, as in MTEB",
    ),
    "LanguageBindVideo": Usage(
        "longest",
        "model",
        "PKU-YuanGroup/LanguageBind, languagebind/video: 8 uniform frames, short side 224, text of 77 tokens",
        "its code crops and flips at random, here the middle is taken; not compared with the released weights",
    ),
    "viclip": Usage(
        "longest",
        "model",
        "OpenGVLab/InternVideo, Data/InternVid/viclip, and the demo of alibaba-pai/VideoCLIP-XL: 8 frames of 224 x 224 "
        "pixels, texts of 32 (ViCLIP) or 248 (VideoCLIP-XL) tokens",
        "their demos take every n-th frame from the first, here the frames are uniform; not compared with the released "
        "weights",
    ),
}

NOT_TRAINED = {"logit_scale", "logit_bias"}  # scale a similarity and no vector; absent from weights saved by towers


@dataclass(frozen=True)
class _Shown:
    """An item as the towers take it: its text, and for each image or clip the image processor's tensors, [T, ...]."""

    text: str
    pictures: list[dict[str, torch.Tensor]]


@dataclass(frozen=True)
class _Prepare:
    images: Any
    clip_frames: int  # what a model that pools frames itself is built for; an image is shown so often; 0: any count

    def __call__(self, item: Item) -> _Shown:
        pictures = []
        for part in item.media:
            if isinstance(part, Video):
                if not isinstance(part.source, Frames):
                    raise InputError(f"{part.name or 'a clip'} was not decoded to frames")
                frames = list(part.source.pixels)
                if self.clip_frames and len(frames) != self.clip_frames:
                    raise InputError(
                        f"{part.name or 'a clip'} has {len(frames)} frames, the model needs {self.clip_frames}"
                    )
            else:
                frames = [np.asarray(part.source)] * max(1, self.clip_frames)
            pictures.append(dict(self.images(frames, return_tensors="pt", input_data_format="channels_last")))
        return _Shown(item.text, pictures)


class ClipEncoder:
    """A dual encoder of transformers as an `Encoder`.

    Args:
        model: with `get_text_features` and `get_image_features`, or `get_video_features` where it pools frames itself.
        tokenizer: of its text tower.
        images: its image processor, PIL-backed: frames in, normalised pixels out.
        sampling: frames of a clip; None takes 8 uniform ones, or the count that the model is built for.
        batch_pictures: most frames, images or texts of one forward pass.
        num_workers: loader processes that decode and resize.

    Raises:
        InputError: an architecture without a record, or other frames than the model is built for.
    """

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        tokenizer: Any,
        images: Any,
        *,
        sampling: Sampling | None = None,
        batch_pictures: int = 64,
        num_workers: int = 0,
    ) -> None:
        self.usage = _usage(model.config.model_type)
        self.model, self.tokenizer = model.eval(), tokenizer
        clip_frames = 0
        if self.usage.clip == "model":
            clip_frames = model.config.vision_config.num_frames
            if sampling not in (None, Sampling.uniform(clip_frames)):
                raise InputError(
                    f"sampling {sampling} does not fit this {model.config.model_type}: it is built for clips of "
                    f"uniform({clip_frames})"
                )
            sampling = Sampling.uniform(clip_frames)
        self.text_length = int(model.config.text_config.max_position_embeddings)
        self.decoding = Decoding(sampling or UVRB_FRAMES, _Prepare(images, clip_frames), batch_pictures, num_workers)
        self.images = images

    @classmethod
    def matches(cls, config: Mapping[str, Any], folder: Path | None) -> bool:
        """Whether a config.json is that of a dual encoder that runs here."""
        return _family(config) in FAMILIES

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        sampling: Sampling | None = None,
        device: str = "cpu",
        dtype: Literal["float32", "bfloat16"] = "float32",
        batch_size: int = 64,
        num_workers: int = 0,
    ) -> ClipEncoder:
        """The encoder of a local folder or hub name; no code of the repository is run.

        Args:
            name: folder or hub name.
            sampling: frames of a clip; None: see the class.
            device: torch device.
            dtype: of the weights.
            batch_size: most frames, images or texts of one forward pass.
            num_workers: loader processes that decode and resize.

        Raises:
            InputError: no such model, an architecture that does not run here, or weights are missing.
        """
        try:
            model, tokenizer, images = _load(name, getattr(torch, dtype))
        except InputError:
            raise
        except (OSError, ValueError) as error:
            raise InputError(f"model {name!r} cannot be loaded: {str(error).strip().splitlines()[0]}") from None
        return cls(
            model.to(device),
            tokenizer,
            images,
            sampling=sampling,
            batch_pictures=batch_size,
            num_workers=num_workers,
        )

    @cached_property
    def dim(self) -> int:
        return int(self._texts([""]).shape[1])

    @cached_property
    def weights_hash(self) -> str:
        return weights_hash(self.model)

    @property
    def inputs(self) -> dict[str, Any]:
        return {
            "adapter": "clip",
            "architecture": self.model.config.model_type,
            "sampling": str(self.decoding.sampling),
            "clip": self.usage.clip,
            "composed": "mean",
            "instruction": "left out",
            "text_length": self.text_length,
            "text_padding": self.usage.text_padding,
            "images": {"class": type(self.images).__name__, **json.loads(self.images.to_json_string())},
        }

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.weights_hash, self.inputs)

    def encode(self, items: Sequence[Item], *, transform: Transform | None = None, progress: str = "") -> Encoded:
        """Vectors of the items; one without text and media counts as the empty text (an ablation's query may be so)."""
        vectors = np.full((len(items), self.dim), np.nan, np.float32)
        failures: dict[int, str] = {}
        with torch.inference_mode(), progress_bar(progress, len(items)) as advance:
            for ready, lost in self.decoding(items, transform):
                failures |= lost
                if ready:
                    vectors[list(ready)] = self._embed(list(ready.values())).float().cpu().numpy()
                advance(len(ready) + len(lost))
        return Encoded(vectors, failures)

    def _embed(self, shown: Sequence[_Shown]) -> torch.Tensor:
        """[n, D] unit rows."""
        parts: list[list[torch.Tensor]] = [[] for _ in shown]
        clips = [(row, tensors) for row, own in enumerate(shown) for tensors in own.pictures]
        if clips:
            for (row, _), vector in zip(clips, self._clips([tensors for _, tensors in clips]), strict=True):
                parts[row].append(vector)
        written = [row for row, own in enumerate(shown) if own.text or not own.pictures]
        if written:
            for row, vector in zip(written, self._texts([shown[row].text for row in written]), strict=True):
                parts[row].append(vector)
        return normalize(torch.stack([torch.stack(own).mean(0) for own in parts]), dim=-1)

    @torch.inference_mode()
    def _texts(self, texts: Sequence[str]) -> torch.Tensor:
        """[n, D] unit rows; texts longer than the tower's positions lose their end."""
        tokens = self.tokenizer(
            list(texts),
            padding=self.usage.text_padding,
            truncation=True,
            max_length=self.text_length,
            return_tensors="pt",
        ).to(self.model.device)
        wanted = {key: tokens[key] for key in ("input_ids", "attention_mask") if key in tokens}
        return normalize(_pooled(self.model.get_text_features(**wanted)).float(), dim=-1)

    def _clips(self, clips: Sequence[Mapping[str, torch.Tensor]]) -> torch.Tensor:
        """[n, D] unit rows of images and clips."""
        if self.usage.clip == "model":
            pixels = self._on_device({"pixel_values": torch.stack([clip["pixel_values"] for clip in clips])})
            return normalize(_pooled(self.model.get_video_features(**pixels)).float(), dim=-1)
        frames = {key: torch.cat([clip[key] for clip in clips]) for key in clips[0]}
        count, step = len(next(iter(frames.values()))), self.decoding.batch_pictures
        vectors = []
        for start in range(0, count, step):
            part = self._on_device({key: value[start : start + step] for key, value in frames.items()})
            vectors.append(normalize(_pooled(self.model.get_image_features(**part)).float(), dim=-1))
        lengths = [len(next(iter(clip.values()))) for clip in clips]
        return normalize(torch.stack([own.mean(0) for own in torch.cat(vectors).split(lengths)]), dim=-1)

    def _on_device(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """On the model's device, pixels in its type."""
        moved = {key: value.to(self.model.device) for key, value in tensors.items()}
        return {key: value.to(self.model.dtype) if value.is_floating_point() else value for key, value in moved.items()}


def _load(name: str, dtype: torch.dtype) -> tuple[transformers.PreTrainedModel, Any, Any]:
    """(model, tokenizer, image processor), every weight from the files."""
    config, _ = transformers.PretrainedConfig.get_config_dict(name)
    if not config:
        raise InputError(f"model {name!r} cannot be opened: it has no config.json")
    family = _family(config)
    _usage(family)
    load = {"LanguageBindVideo": load_language_bind, "viclip": load_joint_clip}.get(family, _load_stock)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # its report warns of a missing scale; what matters is checked below
    try:
        model, report, tokenizer, images = load(name, dtype)
    finally:
        transformers.logging.set_verbosity(verbosity)
    absent = sorted({*report["missing_keys"], *map(str, report["mismatched_keys"])} - NOT_TRAINED)
    if absent:
        raise InputError(f"model {name!r} lacks {len(absent)} weights, for example {absent[0]}; they would be random")
    return model, tokenizer, images


def _load_stock(name: str, dtype: torch.dtype) -> tuple[transformers.PreTrainedModel, Mapping[str, Any], Any, Any]:
    model, report = transformers.AutoModel.from_pretrained(name, dtype=dtype, output_loading_info=True)
    return model, report, transformers.AutoTokenizer.from_pretrained(name), _image_processor(name, model.config)


def _family(config: Mapping[str, Any]) -> str:
    """The architecture of a config.json; ViCLIP's names itself in its classes alone."""
    model_type = str(config.get("model_type", ""))
    classes = [*(config.get("architectures") or ()), *(config.get("auto_map") or {}).values()]
    return "viclip" if any(str(name).endswith("ViCLIP") for name in classes) else model_type


def _pooled(output: Any) -> torch.Tensor:
    """The projected vectors; transformers 5 wraps them."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def _usage(model_type: str) -> Usage:
    if model_type not in FAMILIES:
        raise InputError(
            f"{model_type!r} is no dual encoder that runs here; those of these types do: {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def _image_processor(name: str, config: Any) -> Any:
    """The model's PIL-backed image processor; CLIP's own where a repository ships none (Searchium-ai/clip4clip-*).

    The backend is named because PIL and torchvision round pixels differently.
    """
    try:
        return transformers.AutoImageProcessor.from_pretrained(name, backend="pil")
    except OSError:
        if config.model_type != "clip":
            raise
    side = config.vision_config.image_size
    return transformers.CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
