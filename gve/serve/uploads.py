"""Pictures and clips that are sent in: opened in a child process that can be killed, never in the server.

The child imports this module, so nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from gve.items import Image, InputError, Video
from gve.video import call_guarded, decode_image, is_picture, probe
from gve.video.source import Source

TIMEOUT_S = 20.0
"""The longest a look into an upload may take, in seconds."""


def open_plain(source: Source, name: str) -> tuple[dict[str, Any], bytes]:
    """In the child: a still picture's pixels, or what a video holds."""
    if is_picture(source):
        pixels = decode_image(source, name)
        return {"kind": "image", "shape": pixels.shape}, pixels.tobytes()
    return {"kind": "video", **dataclasses.asdict(probe(source, name))}, b""


def open_medium(source: Path | bytes, name: str, span_s: tuple[float, float] | None = None) -> Image | Video:
    """A picture as its pixels, or a video that was found to be one; the content decides, never the name.

    Args:
        source: file or bytes; frames of a video are read from it later, again in a child.
        name: what messages call it.
        span_s: of a video, the part that is meant, in seconds.

    Raises:
        InputError: it is neither, or a picture was given a span.
    """
    function = f"{open_plain.__module__}:{open_plain.__name__}"
    answer, data = call_guarded(function, source, {}, timeout_s=TIMEOUT_S, name=name)
    if answer["kind"] == "video":
        return Video(source, name=name, span_s=span_s)
    if span_s is not None:
        raise InputError(f"{name} is a picture: it has no span of time")
    # As a file is: the hash is that of the bytes, so the same picture is the same content however it came.
    raw = source if isinstance(source, bytes) else source.read_bytes()
    pixels = np.frombuffer(data, np.uint8).reshape(answer["shape"])
    return Image(pixels, hashlib.sha256(raw).hexdigest(), name)
