"""Pixels -> patches -> normalised patches: what transformers' Qwen2-VL processors do, without torchvision.

The resize is torch's fixed-point uint8 bicubic with antialiasing: the kernel that torchvision, and with it the default
processors, run on uint8 tensors. Like Pillow it rounds and clips to uint8 after the first pass, so it is within 1 of
255 of Pillow on photographs and clips (a few pixels in a million: 2); only where Pillow 13 takes the vertical pass
first, hard edges of drawings differ by up to 24. A float resize keeps the overshoot between the passes: up to 19 on
noise, 13 on photographs, and 20 times the cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from gve.inputs.policy import VisionGeometry
from gve.items import InputError

# Mean and standard deviation of CLIP's training pixels on a scale of 0 to 1, which Qwen2.5-VL uses.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_ASPECT = 200


# Rows that a CPU widens and normalises at a time: 1.2 MB of float32, which stay in the cache between the passes.
_ROWS = 256


@dataclass(frozen=True, eq=False)
class VisionInput:
    """One image or clip, cut into patches that are not normalised yet.

    Args:
        levels: [t*h*w, 3 * temporal_patch * patch**2] uint8.
        grid: (t, h, w) in patches.
        key: equal keys have equal patches.
        pixel_mean, pixel_std: of the three colours on a scale of 0 to 1.
    """

    levels: torch.Tensor
    grid: tuple[int, int, int]
    key: str
    pixel_mean: tuple[float, ...] = PIXEL_MEAN
    pixel_std: tuple[float, ...] = PIXEL_STD

    @property
    def patches(self) -> torch.Tensor:
        """[t*h*w, 3 * temporal_patch * patch**2] float32, normalised, as processors of transformers give them."""
        return normalised(self.levels, self.pixel_mean, self.pixel_std)


def normalised(levels: torch.Tensor, pixel_mean: Sequence[float], pixel_std: Sequence[float]) -> torch.Tensor:
    """What the tower reads, on the device of the bytes.

    Args:
        levels: [P, 3 * temporal_patch * patch**2] uint8, a colour after the other.
        pixel_mean, pixel_std: of the three colours on a scale of 0 to 1.

    Returns:
        [P, 3 * temporal_patch * patch**2] float32: (levels / 255 - mean) / std.
    """
    whole = torch.empty(levels.shape, dtype=torch.float32, device=levels.device)
    rows = _ROWS if levels.device.type == "cpu" else max(len(levels), 1)
    # Plain numbers, rounded to float32: a tensor of three would be copied to the device in every call.
    mean, std = ((255 * torch.tensor(values, dtype=torch.float32)).tolist() for values in (pixel_mean, pixel_std))
    for some, part in zip(whole.split(rows), levels.split(rows), strict=True):
        for colour, one in enumerate(some.copy_(part).view(len(some), 3, -1).unbind(1)):
            one.sub_(mean[colour]).div_(std[colour])
    return whole


def smart_size(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Size in pixels to which a frame is resized: multiples of `factor`, area in bounds, aspect ratio nearly kept.

    Equal to `smart_resize` of transformers and qwen-vl-utils, but never above `max_pixels`: the reference exceeds it on
    some thin strips, where it rounds up or may not shrink the short side below `factor`; here the long side gives way.

    Args:
        height, width: size of the source, in pixels.
        factor: side of one token's square, in pixels.
        min_pixels, max_pixels: bounds of the area.

    Returns:
        (height, width) in pixels.

    Raises:
        InputError: an empty picture, or a side more than 200 times the other.
    """
    if min(height, width) < 1:
        raise InputError(f"a picture of {width}x{height} px is empty")
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise InputError(f"a picture of {width}x{height} px is too thin: the limit is {MAX_ASPECT} to 1; crop it")
    # Python's round: halves go to the even multiple, as in the reference.
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        h = max(factor, math.floor(height / shrink / factor) * factor)
        w = max(factor, math.floor(width / shrink / factor) * factor)
    elif h * w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        h = math.ceil(height * grow / factor) * factor
        w = math.ceil(width * grow / factor) * factor
    if h * w > max_pixels:
        short = min(h, w)
        long = max(factor, max_pixels // (short * factor) * factor)
        h, w = (short, long) if h < w else (long, short)
    return h, w


def cut(
    frames: np.ndarray, height: int, width: int, geometry: VisionGeometry
) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """Resizes frames and cuts them into patches.

    Args:
        frames: [T, H, W, 3] uint8 RGB; T is a multiple of the temporal patch, or 1 for an image, which is repeated.
        height, width: size to resize to, multiples of the geometry's factor (see `smart_size`).
        geometry: of the base model.

    Returns:
        (patches [t*h*w, 3 * temporal_patch * patch**2] uint8, grid (t, h, w) in patches). Patches that merge into one
        token stand together; a patch runs channel, frame, row, column.

    Raises:
        InputError: frames of another shape or dtype, or a number of frames that the temporal patch does not divide.
    """
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8:
        raise InputError(f"frames must be [T, H, W, 3] uint8, got {list(frames.shape)} {frames.dtype}")
    steps, patch, merge = geometry.temporal_patch, geometry.patch, geometry.merge
    if (frames.shape[0] != 1 and frames.shape[0] % steps) or not frames.shape[0]:
        raise InputError(f"{frames.shape[0]} frames cannot be grouped by {steps}; sample a multiple of {steps}")
    # torch warns about arrays it may not write to, such as Pillow's.
    pixels = torch.from_numpy(frames if frames.flags.writeable else frames.copy()).permute(0, 3, 1, 2)
    if pixels.shape[2:] != (height, width):
        pixels = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
    if pixels.shape[0] == 1:
        pixels = pixels.expand(steps, -1, -1, -1)
    t, h, w = pixels.shape[0] // steps, height // patch, width // patch
    # Rows of a patch are moved as one value of `patch` bytes each: half the time of moving single bytes in torch.
    runs = np.ascontiguousarray(pixels.numpy()).view(f"V{patch}")
    runs = runs.reshape(t, steps, 3, h // merge, merge, patch, w // merge, merge).transpose(0, 3, 6, 4, 7, 2, 1, 5)
    levels = np.ascontiguousarray(runs).view(np.uint8).reshape(t * h * w, 3 * steps * patch * patch)
    return torch.from_numpy(levels), (t, h, w)


def patchify(
    frames: np.ndarray, height: int, width: int, geometry: VisionGeometry
) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """`cut`, then normalised: (patches [t*h*w, 3 * temporal_patch * patch**2] float32, grid (t, h, w)).

    Raises:
        InputError: as `cut`.
    """
    levels, grid = cut(frames, height, width, geometry)
    return normalised(levels, PIXEL_MEAN, PIXEL_STD), grid
