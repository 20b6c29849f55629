"""What a toy picture or clip shows, found again from its bytes or, where those were changed, from its pixels.

A synthesis repairs files, cuts frames and clips out of them and stores them anew: their hashes are then nobody's. So
what is not known by its hash is compared with every frame of every known clip, at a quarter of the size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gve.items import Frames, Image, InputError, Video
from gve.toy.render import Shot, frames
from gve.toy.scenes import SIDE_PX, Clip, Scene, Thing
from gve.video import MediaError, Sampling, decode_guarded, decode_image
from gve.video.source import check_exists

REDUCED_PX = SIDE_PX // 4
BLOCK = 4096
MOST_DIFFERENCE = 6.0
"""Mean absolute difference, in levels of 255, up to which a picture is taken for a known frame; JPEG and H.264 leave
it below 2, another scene is above 10 nearly always."""
LOOKED_AT = Sampling.uniform(8)


class Truth:
    """Scene graphs of media.

    Args:
        clips: hex SHA-256 of a file's bytes -> what it shows.
    """

    def __init__(self, clips: Mapping[str, Clip]) -> None:
        self.clips = dict(clips)
        self._found: dict[str, Clip] = {}

    @classmethod
    def read(cls, path: str | Path) -> Truth:
        """Reads what `write` wrote.

        Raises:
            InputError: no such file, or another format.
        """
        clips = {}
        try:
            with open(path) as file:
                for line in file:
                    row = json.loads(line)
                    clips[row["sha256"]] = tuple(_scene(scene) for scene in row["clip"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} holds no truth of the toy world ({error}); write it with gve.toy.truth") from None
        return cls(clips)

    def write(self, path: str | Path) -> None:
        """One JSON object a line: {"sha256": ..., "clip": [scene, ...]}."""
        rows = ({"sha256": sha256, "clip": [asdict(scene) for scene in clip]} for sha256, clip in self.clips.items())
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def of(self, part: Image | Video) -> Clip:
        """What a medium shows: the whole clip of a known file; of others the scenes that are to be seen in it.

        Raises:
            LookupError: it shows nothing that is known.
            MediaError: it cannot be decoded.
        """
        if isinstance(part.source, (str, Path, bytes)):
            check_exists(part.source, part.name)
        key = part.content_hash()
        if key in self.clips:
            return self.clips[key]
        if key not in self._found:
            self._found[key] = self._recognised(part)
        return self._found[key]

    def _recognised(self, part: Image | Video) -> Clip:
        """The scenes that are seen in the clip whose frames are nearest to those of the medium.

        A medium is a run of a clip's frames, so frames are compared in their order, from every frame on that leaves
        room for the rest: clips of one foil group show the same pictures and differ in their order only.
        """
        pictures, indices, length = _pictures(part)
        differences = np.stack([self._differences(picture) for picture in pictures])  # [P, drawn frames]
        nearest, clip, seen = np.inf, next(iter(self.clips.values())), np.zeros(1, np.int64)
        for own, rows in zip(self.clips.values(), self._drawn[1], strict=True):
            begins = np.arange(max(len(rows) - length, 0) + 1)
            places = np.minimum(begins[:, None] + indices, len(rows) - 1)  # [begins, P]
            means = differences[np.arange(len(pictures)), rows[places]].mean(1)
            if means.min() < nearest:
                nearest, clip = means.min(), own
                seen = places[means.argmin()] * len(own) // len(rows)
        if nearest > MOST_DIFFERENCE:
            raise LookupError(f"{part.name or 'a medium'} shows no known scene")
        return tuple(clip[at] for at in sorted(set(map(int, seen))))

    def _differences(self, picture: np.ndarray) -> np.ndarray:
        """Mean absolute difference of a picture to each drawn frame, a block of frames at a time."""
        drawn = self._drawn[0]
        blocks = np.array_split(drawn, -(-len(drawn) // BLOCK))
        return np.concatenate([np.abs(block.astype(np.int16) - picture).mean(1) for block in blocks])

    @cached_property
    def _drawn(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """Every different frame, reduced: [drawn frames, D] uint8; and the rows of each clip's frames in order."""
        drawn: list[np.ndarray] = []
        timelines = []
        for clip in self.clips.values():
            rows: dict[int, int] = {}  # frames in which all stands alike are one array
            pictures = frames(Shot(clip))
            for picture in pictures:
                if id(picture) not in rows:
                    rows[id(picture)] = len(drawn)
                    drawn.append(_reduced(picture))
            timelines.append(np.array([rows[id(picture)] for picture in pictures]))
        if not drawn:
            raise LookupError("no scene is known")
        return np.stack(drawn), timelines


def _pictures(part: Image | Video) -> tuple[list[np.ndarray], np.ndarray, int]:
    """The pictures of a medium, reduced; their indices in it, [P] int64; and how many frames it has.

    Raises:
        MediaError: it cannot be decoded, or is of another size than the toy world.
    """
    if isinstance(part, Image):
        if isinstance(part.source, Frames):
            raise MediaError("frames given as a picture (not-an-image)", reason="not-an-image", name=part.name)
        pictures, indices, length = [decode_image(part.source, part.name)], np.zeros(1, np.int64), 1
    else:
        clip = part.source
        if isinstance(clip, np.ndarray):
            raise MediaError("a clip of bare pixels has no times (not-a-video)", reason="not-a-video", name=part.name)
        if not isinstance(clip, Frames):
            clip = decode_guarded(clip, LOOKED_AT, name=part.name)
        pictures, indices, length = list(clip.pixels), clip.indices, clip.num_frames
    if pictures[0].shape != (SIDE_PX, SIDE_PX, 3):
        height, width, _ = pictures[0].shape
        raise MediaError(f"{width}x{height} px is no picture of the toy world", reason="not-an-image", name=part.name)
    return [_reduced(picture) for picture in pictures], indices, length


def _reduced(picture: np.ndarray) -> np.ndarray:
    """[84, 84, 3] uint8 to the means of blocks of 4 x 4, flat: [1323] uint8."""
    blocks = picture.reshape(REDUCED_PX, 4, REDUCED_PX, 4, 3)
    return blocks.mean((1, 3)).round().astype(np.uint8).ravel()


def _scene(values: Mapping[str, Any]) -> Scene:
    def thing(own: Mapping[str, Any]) -> Thing:
        place, course, slide = (tuple(own[name]) for name in ("place", "course", "slide"))
        return Thing(own["color"], own["shape"], own["size"], place, course, slide)

    return Scene(
        things=tuple(map(thing, values["things"])),
        ground=tuple(values["ground"]),
        camera=tuple(values["camera"]),
        look=values["look"],
        nuisance=values["nuisance"],
    )
