"""Decoders: clips of every codec are made on the spot, read back in the killable child, and compared."""

from __future__ import annotations

import io
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL.features
import PIL.Image

from gve.doctor.check import WIDTH, Check
from gve.items import one_line
from gve.video import DECORD_AVAILABLE, MediaError, Sampling, decode_guarded, decode_image, probe

FRAMES, HEIGHT_PX, WIDTH_PX, RATE_HZ = 12, 96, 128, 8
_MOST_LEVELS = 25.0  # mean difference of a lossy codec or a palette from what was drawn, of 255
# Codec -> (encoders of FFmpeg, ending). Without H.264 nothing works; the others are met in the wild.
CODECS = {
    "h264": (("libx264", "libopenh264"), "mp4"),
    "hevc": (("libx265",), "mp4"),
    "vp8": (("libvpx",), "webm"),
    "vp9": (("libvpx-vp9",), "webm"),
    "av1": (("libaom-av1", "libsvtav1"), "mp4"),
    "mpeg4": (("mpeg4",), "avi"),
    "mjpeg": (("mjpeg",), "mov"),
    "gif": (("gif",), "gif"),
}
_OPTIONS = {"libaom-av1": {"cpu-used": "8"}, "libx265": {"x265-params": "log-level=none"}}
_PICTURES = {"JPEG": "jpg", "PNG": "libpng", "WEBP": "webp", "AVIF": "avif"}  # format -> Pillow's feature


def drawn() -> np.ndarray:
    """[T, H, W, 3] uint8: a bar of 16 px that moves by 8 px a frame over a shade that falls."""
    shade = np.linspace(40, 120, HEIGHT_PX).astype(np.uint8)
    frames = np.repeat(shade[None, :, None, None], FRAMES, 0) * np.ones((1, 1, WIDTH_PX, 3), np.uint8)
    for time, frame in enumerate(frames):
        frame[:, 8 * time : 8 * time + 16] = (230, 200, 60)
    return frames


def write_clip(path: Path, codec: str) -> str:
    """Writes the drawn clip; returns the encoder, or nothing where this build of FFmpeg has none for the codec."""
    encoder = next((name for name in CODECS[codec][0] if name in av.codecs_available and _encodes(name)), "")
    if not encoder:
        return ""
    os.environ.setdefault("SVT_LOG", "0")  # SVT-AV1 writes a page to stderr otherwise
    with av.open(path, "w") as container:
        stream: Any = container.add_stream(encoder, rate=RATE_HZ, options=_OPTIONS.get(encoder, {}))
        stream.width, stream.height = WIDTH_PX, HEIGHT_PX
        stream.pix_fmt = {"mjpeg": "yuvj420p", "gif": "rgb8"}.get(encoder, "yuv420p")
        for pixels in drawn():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return encoder


def _encodes(name: str) -> bool:
    try:
        av.Codec(name, "w")
    except ValueError:
        return False
    return True


def check_codecs() -> Iterator[Check]:
    """Every codec, from an encoder through a file to frames."""
    logging.getLogger("libav").setLevel(logging.CRITICAL)
    decord = "there" if DECORD_AVAILABLE else "no wheel for this system; PyAV decodes everything"
    yield Check("video", "decord", "ok" if DECORD_AVAILABLE else "absent", decord)
    yield Check("video", "PyAV", "ok", f"{av.__version__}, FFmpeg libavcodec {'.'.join(map(str, _libavcodec()))}")
    with tempfile.TemporaryDirectory() as folder:
        for codec, (_, ending) in CODECS.items():
            yield check_codec(codec, Path(folder) / f"clip_{codec}.{ending}")
    try:
        decode_guarded(b"no video at all", Sampling.uniform(2))
        yield Check("video", "killable child", "broken", "it has read a video from no video")
    except MediaError as error:
        good = error.reason == "not-a-video"
        told = "refuses what is no video" if good else one_line(str(error), WIDTH)
        yield Check("video", "killable child", "ok" if good else "broken", told)


def check_codec(codec: str, path: Path) -> Check:
    """One codec: what is read is what was drawn.

    Args:
        codec: of `CODECS`.
        path: of a clip of it; written where it is not there.
    """
    needed = codec == "h264"
    if not path.exists() and not write_clip(path, codec):
        return Check("video", codec, "broken" if needed else "absent", "not tried: no encoder in this build of FFmpeg")
    hint = "pip install --force-reinstall av" + (" decord" if DECORD_AVAILABLE else "")
    try:
        frames = decode_guarded(path, Sampling.uniform(FRAMES), timeout_s=60.0)
        backend = probe(path).backend
    except MediaError as error:
        return Check("video", codec, "broken" if needed else "weak", one_line(str(error), WIDTH), hint)
    fault = difference(frames.pixels)
    if fault:
        return Check("video", codec, "broken" if needed else "weak", f"by {backend}: {fault}", hint)
    return Check("video", codec, "ok", f"by {backend}")


def difference(pixels: np.ndarray) -> str:
    """How decoded frames differ from the drawn ones: each must be nearest to its own. Empty where they do not.

    Args:
        pixels: [T, H, W, 3] uint8.
    """
    if pixels.shape != drawn().shape:
        return f"reads {list(pixels.shape)} of {list(drawn().shape)}"
    levels = np.abs(pixels[:, None].astype(np.int16) - drawn()[None]).mean(axis=(2, 3, 4))  # [T decoded, T drawn]
    if (nearest := levels.argmin(axis=1)).tolist() != list(range(FRAMES)):
        return f"reads the frames {nearest.tolist()}"
    own = float(levels.diagonal().max())
    return "" if own < _MOST_LEVELS else f"{own:.0f} levels of 255 off"


def _libavcodec() -> tuple[int, ...]:
    return av.library_versions["libavcodec"]


def check_pictures() -> Iterator[Check]:
    """Formats of still pictures, written and read."""
    picture = drawn()[0]
    for form, feature in _PICTURES.items():
        needed = form in ("JPEG", "PNG")
        if form != "PNG" and not PIL.features.check(feature):
            yield Check("pictures", form, "broken" if needed else "absent", "not in this build of Pillow")
            continue
        file = io.BytesIO()
        PIL.Image.fromarray(picture).save(file, form)
        levels = float(np.abs(decode_image(file.getvalue()).astype(int) - picture).mean())
        good = levels < _MOST_LEVELS
        yield Check("pictures", form, "ok" if good else "broken", f"{levels:.1f} of 255 off")
