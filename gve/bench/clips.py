"""Clips to measure on: the user's own, or rendered ones of a usual size."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np

from gve.bench.measure import Options
from gve.data.build import BuildOptions, build
from gve.data.manifest import Presample
from gve.data.sources import Source, open_sources
from gve.items import InputError
from gve.video import MediaError, Sampling, probe

HEIGHT, WIDTH, FPS, SECONDS = 360, 640, 30, 10
CAPTION = "a person walks slowly from the left of the room to the window and opens it while the camera follows"
MAX_CLIPS = 8
RENDERED = 4


def clips_of(options: Options) -> tuple[list[Path], str]:
    """(files, what they are) to decode: at most MAX_CLIPS.

    Raises:
        InputError: the user's folder holds no clip that can be read.
    """
    if options.videos is None:
        folder = options.folder / "clips"
        folder.mkdir(exist_ok=True)
        paths = [folder / f"{number}.mp4" for number in range(RENDERED)]
        for number, path in enumerate(paths):
            if not path.exists():
                render(path, seed=number)
        return paths, f"{len(paths)} rendered clips: h264, {WIDTH}x{HEIGHT}, {FPS} fps, {SECONDS} s"
    found: list[Path] = []
    for path in sorted(options.videos.rglob("*")):
        if path.is_file() and len(found) < MAX_CLIPS:
            try:
                # decord, which the stock way reads with, takes these only.
                if probe(path).backend == "decord":
                    found.append(path.resolve())
            except MediaError:
                continue
    if not found:
        raise InputError(f"--videos {options.videos}: no clip there that decord can read")
    return found, f"{len(found)} clips of {options.videos}"


def render(path: Path, *, seed: int, seconds: float = SECONDS, height: int = HEIGHT, width: int = WIDTH) -> None:
    """Writes an h264 clip: a textured picture with noise in it, over which a camera pans."""
    random = np.random.default_rng(seed)
    picture = np.zeros((2 * height, 2 * width, 3))
    for octave in (4, 8, 16, 32, 64):  # as photographs: less contrast in finer detail
        coarse = random.normal(size=(octave, octave, 3))
        rows, columns = (np.arange(side) * octave // side for side in picture.shape[:2])
        picture += coarse[rows][:, columns] * 60 / octave**0.5
    pixels = np.clip(127 + picture + random.normal(size=picture.shape) * 6, 0, 255).astype(np.uint8)
    count = int(seconds * FPS)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.options = {"preset": "veryfast"}
        for number in range(count):
            top, left = int(height * number / count), int(width * (0.5 + 0.5 * np.sin(number / 40)))
            frame = av.VideoFrame.from_ndarray(
                np.ascontiguousarray(pixels[top : top + height, left : left + width]), format="rgb24"
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def shards_of(clips: list[Path], folder: Path, presample: Sampling | None = None, frame_px: int = 0) -> Source:
    """A source of text-to-video pairs over the clips, built as `gve shards build` does."""
    name = "raw" if presample is None else "frames"
    listing = folder / f"{name}.jsonl"
    rows = [{"query": {"text": CAPTION}, "target": {"video": str(path)}, "task": "T2V"} for path in clips]
    listing.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stored = None if presample is None else Presample(presample, frame_px)
    build(listing, folder / name, BuildOptions(source=name, task="T2V", presample=stored))
    return open_sources(folder / name)[name]
