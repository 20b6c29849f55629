"""What users run without this project: qwen-vl-utils reads and resizes, transformers' processor makes model inputs."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from gve.inputs import InputPolicy, normalised
from gve.items import EmbedBatch, Frames, InputError, Item, Video

EXTRA = ("torchvision", "qwen_vl_utils", "decord")
READER = "FORCE_QWENVL_VIDEO_READER"
# A loader of gve hands pictures over as bytes, and the device normalises them. The stock way does so in its processor:
# the same on this core is timed beside it, under this name.
HERE = "gve, normalised on this core"


class StockInputs:
    """Messages -> model inputs, as the model card of Qwen2.5-VL writes it; frames, sizes and prompt as in a policy.

    Positions are no part of it: stock transformers computes them in the model's forward pass.

    Args:
        base: folder with tokenizer, chat template and processor configuration.
        policy: uniform frames only.

    Raises:
        InputError: the extra `bench` is not installed, or the policy has no stock form.
    """

    def __init__(self, base: str | Path, policy: InputPolicy) -> None:
        if policy.sampling.kind != "uniform":
            raise InputError(f"sampling {policy.sampling}: the stock way is measured with uniform frames")
        self._policy = policy
        self._utils = _modules()
        from transformers import AutoProcessor

        self._processor = AutoProcessor.from_pretrained(str(base))
        geometry = self._processor.image_processor
        self._area = (geometry.patch_size * geometry.merge_size) ** 2

    def __call__(self, items: Sequence[Item]) -> Any:
        """Padded inputs of a batch: input_ids, attention_mask and, where there are clips, pixel_values_videos."""
        messages = [self._messages(item) for item in items]
        with _quiet():
            _, videos, options = self._utils.process_vision_info(
                messages, return_video_kwargs=True, return_video_metadata=True
            )
        return self._process(messages, videos or [], **options)

    def of_frames(self, items: Sequence[Item]) -> Any:
        """The same of clips that are decoded already; the processor resizes."""
        videos = []
        for item in items:
            for part in item.media:
                if not isinstance(part.source, Frames):
                    raise InputError("of_frames takes decoded clips")
                clip = part.source
                metadata = {
                    "fps": clip.native_fps,
                    "frames_indices": clip.indices.tolist(),
                    "total_num_frames": clip.num_frames,
                }
                videos.append((torch.from_numpy(clip.pixels).permute(0, 3, 1, 2), metadata))
        size = {
            "shortest_edge": self._policy.min_frame_tokens * self._area,
            "longest_edge": self._policy.max_frame_tokens * self._area,
        }
        messages = [self._messages(item) for item in items]
        return self._process(messages, videos, do_sample_frames=False, videos_kwargs={"size": size})

    def _process(self, messages: list[Any], videos: Sequence[tuple[torch.Tensor, Any]], **options: Any) -> Any:
        prompts = [
            self._processor.apply_chat_template(one, tokenize=False, add_generation_prompt=True)
            + ("<|endoftext|>" if self._policy.append_eos else "")
            for one in messages
        ]
        return self._processor(
            text=prompts,
            videos=[clip for clip, _ in videos] or None,
            video_metadata=[metadata for _, metadata in videos] or None,
            padding=True,
            padding_side=self._policy.padding_side,
            cap_pixels_per_frame=False,
            return_tensors="pt",
            **options,
        )

    def positions_of(self, base: str | Path) -> Callable[[Any], torch.Tensor]:
        """Inputs -> [3, B, L] positions, as the forward pass of transformers' model computes them each time."""
        from transformers import AutoConfig, Qwen2_5_VLModel

        with torch.device("meta"):  # the rule needs the configuration, no weights
            model = Qwen2_5_VLModel(AutoConfig.from_pretrained(str(base)))

        def positions(inputs: Any) -> torch.Tensor:
            return model.get_rope_index(
                inputs["input_ids"],
                mm_token_type_ids=inputs["mm_token_type_ids"],
                video_grid_thw=inputs.get("video_grid_thw"),
                second_per_grid_ts=inputs.get("second_per_grid_ts"),
                attention_mask=inputs["attention_mask"],
            )[0]

        return positions

    def _messages(self, item: Item) -> list[dict[str, Any]]:
        content: list[dict[str, Any]] = []
        for part in item.media:
            if not isinstance(part, Video):
                raise InputError("the stock way is measured on texts and clips")
            content.append(
                {
                    "type": "video",
                    "video": str(part.source) if isinstance(part.source, (str, Path)) else "",
                    "nframes": self._policy.sampling.num_frames,
                    "min_pixels": self._policy.min_frame_tokens * self._area,
                    "max_pixels": self._policy.max_frame_tokens * self._area,
                }
            )
        text = f"{item.instruction} {item.text}" if item.instruction and item.text else item.instruction or item.text
        if text:
            content.append({"type": "text", "text": text})
        return [
            {"role": "system", "content": [{"type": "text", "text": self._policy.system_prompt}]},
            {"role": "user", "content": content},
        ]


def difference(ours: EmbedBatch, theirs: Any) -> float:
    """Largest difference of two batches' pixels, in levels of 255; infinite where prompts or grids differ.

    Args:
        ours: of the project's builder.
        theirs: of `StockInputs`.
    """
    return _levels(ours, theirs, lambda levels: levels.max())


def mean_difference(ours: EmbedBatch, theirs: Any) -> float:
    """As `difference`, but the mean over pixels: for frames that went through JPEG."""
    return _levels(ours, theirs, lambda levels: levels.mean())


def clip_pixels(batch: EmbedBatch) -> torch.Tensor | None:
    """The clips of a batch as the tower reads them; None without any."""
    if batch.video_patches is None:
        return None
    return normalised(batch.video_patches, batch.pixel_mean, batch.pixel_std)


def _levels(ours: EmbedBatch, theirs: Any, fold: Any) -> float:
    mask = ours.attention_mask
    if mask.shape != theirs["attention_mask"].shape or not torch.equal(mask, theirs["attention_mask"]):
        return float("inf")
    if not torch.equal(ours.input_ids[mask.bool()], theirs["input_ids"][mask.bool()]):
        return float("inf")
    pixels, grid = clip_pixels(ours), ours.video_grid
    if pixels is None or grid is None:
        return 0.0 if "pixel_values_videos" not in theirs else float("inf")
    if not torch.equal(grid, theirs["video_grid_thw"]):
        return float("inf")
    std = torch.tensor(ours.pixel_std).view(3, 1)
    levels = (pixels - theirs["pixel_values_videos"]).view(len(pixels), 3, -1).abs() * std * 255
    return float(fold(levels))


def prepare_torchvision() -> None:
    """Makes an installed torchvision importable beside another build of torch; before anything imports transformers.

    Its wheel for CUDA finds no operators beside torch for CPU and raises, and so do transformers and Lightning, which
    import it where they find it. The processors need none of its operators, only that their names are there.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)


def _modules() -> Any:
    """The module qwen_vl_utils.

    Raises:
        InputError: it, or what it reads with, is not installed.
    """
    if missing := [name for name in EXTRA if importlib.util.find_spec(name) is None]:
        raise InputError(
            f"the stock way needs {', '.join(missing)}: pip install 'gve[bench]' (decord has wheels for x86-64 Linux "
            "only)"
        )
    os.environ.setdefault(READER, "decord")  # its default here; torchvision 0.28 reads no videos
    return importlib.import_module("qwen_vl_utils")


_KEPT: list[Any] = []  # a library that is dropped takes its operators along


@contextlib.contextmanager
def _quiet() -> Any:
    """It prints the reader it has chosen, once; kept out of what `--json` prints around it."""
    logger = logging.getLogger("qwen_vl_utils")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            yield
    finally:
        logger.setLevel(before)
