"""Pictures and clips as the content of a chat message: frames by the project's own sampler, as JPEGs in base64."""

from __future__ import annotations

import asyncio
import base64
import json
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from gve.items import Frames, Image, InputError, Media, Part, Text, Video
from gve.video import MediaError, Sampling, decode_guarded, decode_image, encode_jpeg

CACHE_BYTES = 1 << 28
"""A clip is asked about some ten times within minutes: its captions, its frames, its pairs. Some 2,000 clips."""

Content = tuple[tuple[bytes, ...], dict[str, Any]]
"""JSON objects of a message's content list, in order; and fields of the request's body that describe them to vLLM."""


@dataclass(frozen=True)
class Framing:
    """What a server is shown of a picture or clip.

    Args:
        sampling: which frames of a clip are sent.
        longest_side_px: larger pictures are scaled down to it before they are sent; 0 keeps their size.
        jpeg_quality: 1 to 95.
        decode_threads: clips that are decoded at once; each in a child process that is killed when it hangs.

    Raises:
        InputError: a value is out of its range.
    """

    sampling: Sampling = field(default_factory=Sampling)
    longest_side_px: int = 448
    jpeg_quality: int = 90
    decode_threads: int = 2

    def __post_init__(self) -> None:
        if self.longest_side_px < 0 or not 1 <= self.jpeg_quality <= 95 or self.decode_threads < 1:
            raise InputError(
                f"framing: longest_side_px {self.longest_side_px}, jpeg_quality {self.jpeg_quality}, decode_threads "
                f"{self.decode_threads}: use 0 or more, 1 to 95, at least 1"
            )

    def __str__(self) -> str:
        """All that decides the pixels."""
        return f"{self.sampling} {self.longest_side_px}px q{self.jpeg_quality}"


class JpegStore:
    """Makes the content of messages in threads, and keeps what it made while there is room."""

    def __init__(self, framing: Framing, *, cache_bytes: int = CACHE_BYTES) -> None:
        self.framing = framing
        self._threads = ThreadPoolExecutor(framing.decode_threads, thread_name_prefix="frames")
        self._kept: OrderedDict[tuple[str, bool], asyncio.Future[Content]] = OrderedDict()
        self._room = cache_bytes

    async def content(self, part: Part, as_video: bool) -> Content:
        """The content of a part.

        Args:
            part: a text, a picture, or a clip.
            as_video: a clip as one clip in vLLM's form; else frame by frame with times.

        Raises:
            MediaError: a medium cannot be decoded.
            OSError: a file cannot be read.
        """
        if isinstance(part, Text):
            return (_text(part.text),), {}
        key = (await self._name(part), as_video)
        known = self._kept.get(key)
        if known is None:
            known = self._kept[key] = self._in_thread(lambda: self._make(part, as_video))
            known.add_done_callback(lambda made: self._account(made))
        self._kept.move_to_end(key)
        # Several requests may wait for the same clip: one that is cancelled must not cancel it for the others.
        return await asyncio.shield(known)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _in_thread(self, work: Callable[[], Any]) -> asyncio.Future[Any]:
        return asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def _name(self, part: Media) -> str:
        kind = type(part).__name__
        if not part.sha256 and isinstance(part.source, (str, Path)):
            return f"{kind} {part.source}"
        return f"{kind} {part.sha256 or await self._in_thread(part.content_hash)}"

    def _account(self, made: asyncio.Future[Content]) -> None:
        """Takes what was made off the room; the longest unused go until it fits."""
        if made.cancelled() or made.exception() is not None:
            return  # why a clip cannot be used is kept too: it takes no room, and would not change
        self._room -= _size(made.result())
        while self._room < 0 and len(self._kept) > 1:
            key, oldest = next(iter(self._kept.items()))
            if not oldest.done():
                return
            del self._kept[key]
            if not oldest.cancelled() and oldest.exception() is None:
                self._room += _size(oldest.result())

    def _make(self, part: Image | Video, as_video: bool) -> Content:
        if isinstance(part, Image):
            if isinstance(part.source, Frames):
                raise MediaError("frames given as a picture (not-an-image)", reason="not-an-image", name=part.name)
            return (_image(self._jpeg(decode_image(part.source, name=part.name))),), {}
        clip = part.source
        if isinstance(clip, np.ndarray):
            raise MediaError("a clip of bare pixels has no times (not-a-video)", reason="not-a-video", name=part.name)
        if not isinstance(clip, Frames):
            clip = decode_guarded(clip, self.framing.sampling, name=part.name)
        jpegs = [self._jpeg(pixels) for pixels in clip.pixels]
        if as_video:
            return _video(clip, jpegs)
        told = [(_text(f"Frame at {at:.1f} s:"), _image(jpeg)) for at, jpeg in zip(clip.times_s, jpegs, strict=True)]
        return tuple(fragment for pair in told for fragment in pair), {}

    def _jpeg(self, pixels: np.ndarray) -> str:
        longest = self.framing.longest_side_px
        if longest and max(pixels.shape[:2]) > longest:
            picture = PIL.Image.fromarray(pixels)
            picture.thumbnail((longest, longest), PIL.Image.Resampling.BICUBIC)
            pixels = np.asarray(picture)
        return base64.b64encode(encode_jpeg(pixels, self.framing.jpeg_quality)).decode()


def _text(text: str) -> bytes:
    return json.dumps({"type": "text", "text": text}).encode()


def _image(jpeg: str) -> bytes:
    return json.dumps({"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{jpeg}"}}).encode()


def _video(clip: Frames, jpegs: list[str]) -> Content:
    """A clip as vLLM takes it: JPEGs joined by commas, and beside them where in the file they stand.

    Without `num_frames` the server would take the first 32 and drop the rest; without indices and rate it would give
    the model the times of a clip of one frame a second.
    """
    fps = clip.native_fps or 1.0
    count = max(clip.num_frames, len(jpegs))  # a clip too short repeats frames; the server wants no fewer than are sent
    about = {
        "num_frames": len(jpegs),
        "fps": fps,
        "frames_indices": [int(index) for index in clip.indices],
        "total_num_frames": count,
        "duration": count / fps,
        "do_sample_frames": False,
    }
    url = {"url": f"data:video/jpeg;base64,{','.join(jpegs)}"}
    times = ", ".join(f"{at:.1f}" for at in clip.times_s)
    told = f"The clip is {count / fps:.1f} s long; its {len(jpegs)} frames were taken at {times} s."
    beside = {
        "media_io_kwargs": {"video": about},
        "mm_processor_kwargs": {"fps": clip.sampled_fps, "do_sample_frames": False},
    }
    return (json.dumps({"type": "video_url", "video_url": url}).encode(), _text(told)), beside


def _size(content: Content) -> int:
    return sum(map(len, content[0]))
