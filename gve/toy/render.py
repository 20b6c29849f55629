"""Scenes to pixels, pixels to mp4 and JPEG files. Imports neither torch nor the rest of the library.

Sprites are cached per (shape, radius) and blitted at whole pixels: a clip of 32 frames takes about 3 ms to draw and
8 ms to encode. Files are the same bytes for the same scene: x264 runs on one thread and no time is written.
"""

from __future__ import annotations

import hashlib
import io
import math
import multiprocessing
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import av
import numpy as np
from av.container import OutputContainer
from PIL import Image as PILImage

from gve.toy.scenes import CELL_PX, FPS, RADIUS_PX, SIDE_PX, Clip, Scene, scene_times, thing_pose, view_pose

# One palette per dialect: the same words, other shades. Things are bright, grounds are muted.
PAINT = {
    "A": {
        "red": (222, 32, 32), "orange": (255, 136, 0), "yellow": (250, 226, 40), "pink": (255, 128, 192),
        "green": (36, 176, 56), "cyan": (64, 220, 232), "blue": (48, 88, 255), "purple": (152, 48, 200),
        "grey": (120, 120, 120), "black": (24, 24, 24), "white": (236, 236, 236), "navy": (24, 32, 88),
        "brown": (92, 60, 36), "olive": (92, 100, 44),
    },
    "B": {
        "red": (184, 16, 40), "orange": (240, 116, 32), "yellow": (232, 204, 0), "pink": (244, 104, 168),
        "green": (72, 200, 88), "cyan": (40, 196, 200), "blue": (32, 60, 208), "purple": (124, 64, 176),
        "grey": (148, 146, 140), "black": (40, 36, 40), "white": (248, 244, 228), "navy": (36, 40, 112),
        "brown": (116, 76, 52), "olive": (112, 116, 60),
    },
}  # fmt: skip
PATTERN_CONTRAST = 26  # levels between a pattern's two tones
JPEG_QUALITY = 95
X264 = {"preset": "superfast", "crf": "18", "g": "32", "threads": "1", "x264-params": "log=-1"}


@dataclass(frozen=True)
class Shot:
    """A video to be made: frames `start` to `stop` of a clip, all by default."""

    clip: Clip
    start: int = 0
    stop: int | None = None

    @property
    def name(self) -> str:
        return f"{_digest(self)}.mp4"


@dataclass(frozen=True)
class Still:
    """A picture to be made: one frame (of the 32) of a scene."""

    scene: Scene
    time: int

    @property
    def name(self) -> str:
        return f"{_digest(self)}.jpg"


def _digest(spec: Shot | Still) -> str:
    return hashlib.sha256(repr(spec).encode()).hexdigest()[:16]


@lru_cache(maxsize=512)
def _sprite(shape: str, radius_px: float) -> np.ndarray:
    """Coverage of a shape, [2R+1, 2R+1] float32 in 0..1, antialiased by 4 x 4 samples a pixel."""
    reach = math.ceil(radius_px)
    samples = (np.arange((2 * reach + 1) * 4) + 0.5) / 4 - reach - 0.5
    x, y = np.meshgrid(samples, samples)
    r, angle = np.hypot(x, y), np.arctan2(x, -y)
    if shape == "circle":
        inside = r <= radius_px
    elif shape == "ring":
        inside = (r <= radius_px) & (r >= 0.55 * radius_px)
    elif shape == "square":
        inside = np.maximum(abs(x), abs(y)) <= 0.85 * radius_px
    elif shape == "cross":
        inside = (np.minimum(abs(x), abs(y)) <= 0.3 * radius_px) & (np.maximum(abs(x), abs(y)) <= radius_px)
    elif shape == "triangle":
        inside = (y <= 0.75 * radius_px) & (y >= -radius_px + 1.75 * abs(x))
    else:  # a star: the radius runs between points and notches five times round
        turn = np.abs((angle / (2 * math.pi) * 5) % 1 - 0.5) * 2  # 1 on a point, 0 on a notch
        inside = r <= radius_px * (0.4 + 0.6 * turn**1.5)
    side = 2 * reach + 1
    return inside.reshape(side, 4, side, 4).mean((1, 3)).astype(np.float32)


@lru_cache(maxsize=64)
def _ground(
    look: str, ground: tuple[str, str], dx: float, dy: float, scale: float, phase: tuple[int, int]
) -> np.ndarray:
    """The ground under the view, [H, W, 3] float32. Patterns repeat every 28 px, so that half a frame is no riddle."""
    tone, pattern = ground
    paint = np.array(PAINT[look][tone], np.float32)
    centre = SIDE_PX / 2
    axis = (np.arange(SIDE_PX, dtype=np.float32) + 0.5 - centre) / scale + centre
    x, y = axis[None, :] + dx + phase[0], axis[:, None] + dy + phase[1]
    half = CELL_PX / 2
    if pattern == "striped":
        on = (np.floor((x + y) / half) % 2).astype(np.float32)
    elif pattern == "checked":
        on = (np.floor(x / half) + np.floor(y / half)) % 2
    elif pattern == "dotted":
        on = (np.hypot(x % CELL_PX - half, y % CELL_PX - half) <= 6).astype(np.float32)
    else:
        on = np.zeros((SIDE_PX, SIDE_PX), np.float32)
    step = PATTERN_CONTRAST if paint.mean() < 128 else -PATTERN_CONTRAST
    return paint + step * on[..., None]


def draw(scene: Scene, time: int) -> np.ndarray:
    """One frame of a scene: [84, 84, 3] uint8 RGB."""
    chance = random.Random(scene.nuisance)
    phase = (chance.randrange(CELL_PX), chance.randrange(CELL_PX))
    view = view_pose(scene, time)
    picture = _ground(scene.look, scene.ground, view.dx, view.dy, view.scale, phase).copy()
    shifts = [(chance.randint(-1, 1), chance.randint(-1, 1)) for _ in scene.things]
    paired = sorted(zip(scene.things, shifts, strict=True), key=lambda pair: pair[0].size)  # small ones on top
    for thing, (jitter_x, jitter_y) in paired:
        pose = thing_pose(thing, time)
        if not pose.visible:
            continue
        x = (thing.place[0] + 0.5) * CELL_PX + jitter_x + pose.dx - view.dx
        y = (thing.place[1] + 0.5) * CELL_PX + jitter_y + pose.dy - view.dy
        centre = SIDE_PX / 2
        x, y = (x - centre) * view.scale + centre, (y - centre) * view.scale + centre
        radius = round(RADIUS_PX[thing.size] * pose.scale * view.scale * 2) / 2
        _blit(picture, _sprite(thing.shape, radius), round(x - 0.5), round(y - 0.5), PAINT[scene.look][thing.color])
    return picture.round().astype(np.uint8)


def _blit(picture: np.ndarray, sprite: np.ndarray, x: int, y: int, paint: tuple[int, int, int]) -> None:
    reach = sprite.shape[0] // 2
    top, left = max(0, y - reach), max(0, x - reach)
    bottom, right = min(SIDE_PX, y + reach + 1), min(SIDE_PX, x + reach + 1)
    if top >= bottom or left >= right:
        return
    cover = sprite[top - y + reach : bottom - y + reach, left - x + reach : right - x + reach, None]
    window = picture[top:bottom, left:right]
    window += cover * (np.array(paint, np.float32) - window)


def frames(shot: Shot) -> list[np.ndarray]:
    """Every frame of a shot, [84, 84, 3] uint8 each; frames in which all stands alike are drawn once."""
    drawn: dict[object, np.ndarray] = {}
    pictures = []
    for scene, time in list(scene_times(shot.clip))[shot.start : shot.stop]:
        poses = (id(scene), view_pose(scene, time), *(thing_pose(thing, time) for thing in scene.things))
        if poses not in drawn:
            drawn[poses] = draw(scene, time)
        pictures.append(drawn[poses])
    return pictures


def render(spec: Shot | Still) -> bytes:
    """The file of a shot (H.264 in mp4, 8 fps) or of a still (JPEG, no chroma subsampling)."""
    if isinstance(spec, Still):
        buffer = io.BytesIO()
        PILImage.fromarray(draw(spec.scene, spec.time)).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        return buffer.getvalue()
    return encode(frames(spec))


def encode(pictures: Sequence[np.ndarray], *, crf: str = X264["crf"], side_px: int = SIDE_PX) -> bytes:
    """The file of a clip, H.264 in mp4, 8 fps.

    Args:
        pictures: frames, [84, 84, 3] uint8 RGB each.
        crf: quality of x264; higher is worse.
        side_px: width and height of the file, even.
    """
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        mux(container, pictures, crf=crf, side_px=side_px)
    return buffer.getvalue()


def mux(
    container: OutputContainer, pictures: Sequence[np.ndarray], *, crf: str = X264["crf"], side_px: int = SIDE_PX
) -> None:
    """Writes the pictures as one H.264 stream into an open container."""
    stream = container.add_stream("libx264", rate=FPS, options=X264 | {"crf": crf})
    stream.width = stream.height = side_px
    stream.pix_fmt = "yuv420p"
    for picture in pictures:
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def _render_many(specs: list[Shot | Still]) -> list[bytes]:
    return [render(spec) for spec in specs]


def render_all(
    specs: Collection[Shot | Still], jobs: int = 2, advance: Callable[[int], None] = lambda count: None
) -> Iterator[tuple[Shot | Still, bytes]]:
    """Render many specs in `jobs` processes, in the order given.

    Args:
        advance: told how many more are done, for a progress bar.
    """
    ordered = list(specs)
    chunks = [ordered[i : i + 64] for i in range(0, len(ordered), 64)]
    if jobs <= 1:
        for chunk in chunks:
            yield from zip(chunk, _render_many(chunk), strict=True)
            advance(len(chunk))
        return
    context = multiprocessing.get_context("spawn")  # fork would copy torch's threads, if the caller has any
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        for chunk, files in zip(chunks, pool.map(_render_many, chunks), strict=True):
            yield from zip(chunk, files, strict=True)
            advance(len(chunk))
