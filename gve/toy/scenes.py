"""Scenes: what is in a toy clip and where everything is at each frame. The truth that captions and pictures share.

A scene is one or more coloured things on a patterned ground under a camera. Its time line is made for eight
uniformly sampled frames (0, 4, 9, 13, 18, 22, 27, 31 of 32): four slots, one sampled frame in the middle of each, so
that each pair of frames which the model merges in time (temporal patch 2) holds exactly one slot; and a rest from
frame 13 to 18, where everything is in its home pose. The middle frame therefore shows what is there, and never what
happens: the static ceiling of a set follows from the scene alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

SIDE_PX = 84  # 3 x 3 cells of 28 px; a cell is one merged vision token
CELL_PX = 28
FRAMES = 32  # of a clip of one scene; a scene inside a long clip takes half as many
FPS = 8
SLOTS = ((1, 6), (7, 12), (19, 24), (25, 30))  # first and last frame of each slot
REST_FRAMES = (13, 18)  # everything is at home from the first to the last of these
PICTURE_FRAME = 15  # the frame of a still picture
SAMPLED_FRAMES = (0, 4, 9, 13, 18, 22, 27, 31)  # uniform(8) of 32 frames

WARM = ("red", "orange", "yellow", "pink")
COOL = ("green", "cyan", "blue", "purple")
COLORS = WARM + COOL
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = ("small", "large")
TONES = ("grey", "black", "white", "navy", "brown", "olive")
PATTERNS = ("plain", "striped", "checked", "dotted")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
HOPS = tuple(f"hop {direction}" for direction in DIRECTIONS)
EVENTS = (*HOPS, "blink", "swell", "shrink")  # out and back within one slot
REST = ""  # no event in a slot, no slide in a half
CAMERA_MOVES = ("pan left", "pan right", "tilt up", "tilt down", "zoom in", "zoom out", "shake")
STILL_CAMERA = ("still", "still")
RADIUS_PX = {"small": 8.0, "large": 13.0}
SLIDE_PX = 21  # to each side of home: half the frame in all
ZOOM = 0.37  # natural logarithm of the scale at either end: 0.69 to 1.45

Place = tuple[int, int]  # column and row, 0 to 2
Course = tuple[str, str, str, str]
NO_COURSE: Course = (REST, REST, REST, REST)


@dataclass(frozen=True)
class Thing:
    """One coloured shape.

    Args:
        place: its home cell as (column, row).
        course: the event of each of the four slots, REST for none.
        slide: direction of its drift in the first and in the second half, through its home in the middle; REST for
            none. A thing has a course or a slide, not both.
    """

    color: str
    shape: str
    size: str
    place: Place
    course: Course = NO_COURSE
    slide: tuple[str, str] = (REST, REST)

    @property
    def events(self) -> tuple[str, ...]:
        """What it does in order: slot events, and a slide as "slide <direction>"."""
        slides = self.slide[:1] if self.slide[0] == self.slide[1] else self.slide
        return tuple(event for event in self.course if event) + tuple(f"slide {s}" for s in slides if s)


@dataclass(frozen=True)
class Scene:
    """Things on a ground under a camera.

    Args:
        ground: (tone, pattern).
        camera: its move in the first and in the second half, "still" for none.
        look: the dialect whose palette paints it, "A" or "B".
        nuisance: seed of the small shifts that no caption tells; equal in all scenes of a foil group.
    """

    things: tuple[Thing, ...]
    ground: tuple[str, str]
    camera: tuple[str, str] = STILL_CAMERA
    look: str = "A"
    nuisance: int = 0


Clip = tuple[Scene, ...]


@dataclass(frozen=True)
class Pose:
    """How a thing or the view stands at one frame: shift in px, scale, and whether it is to be seen."""

    dx: float = 0.0
    dy: float = 0.0
    scale: float = 1.0
    visible: bool = True


def progress(time: float) -> float:
    """Way of a steady motion at a frame of the 32: -1 at the start, 0 during the rest, 1 at the end."""
    first, last = REST_FRAMES
    if time < first:
        return time / first - 1
    return max(0.0, (time - last) / (FRAMES - 1 - last))


def thing_pose(thing: Thing, time: float) -> Pose:
    """Pose of a thing relative to its home cell at a frame of the 32."""
    way = progress(time)
    slide = thing.slide[0] if way < 0 else thing.slide[1]
    if slide:
        x, y = DIRECTIONS[slide]
        return Pose(x * way * SLIDE_PX, y * way * SLIDE_PX)
    for event, (first, last) in zip(thing.course, SLOTS, strict=True):
        if event and first <= time <= last:
            part = 0.5 if time in (first, last) else 1.0
            if event == "blink":
                return Pose(visible=part < 1)
            if event == "swell":
                return Pose(scale=1 + 0.5 * part)
            if event == "shrink":
                return Pose(scale=1 - 0.5 * part)
            x, y = DIRECTIONS[event.removeprefix("hop ")]
            return Pose(x * part * CELL_PX, y * part * CELL_PX)
    return Pose()


def view_pose(scene: Scene, time: float) -> Pose:
    """Where the view has moved to at a frame of the 32; what it shows moves the other way."""
    way = progress(time)
    move = scene.camera[0] if way < 0 else scene.camera[1]
    if way == 0 or move == "still":
        return Pose()
    if move == "shake":
        dx, dy = ((6, -2), (-6, 3), (1, 6))[int(time) % 3]
        return Pose(dx, dy)
    if move.startswith("zoom"):
        return Pose(scale=math.exp(ZOOM * (way if move == "zoom in" else -way)))
    x, y = DIRECTIONS[move.split()[1]]
    return Pose(x * way * SLIDE_PX, y * way * SLIDE_PX)


def still_state(scene: Scene) -> tuple[object, ...]:
    """All that the middle frame tells: equal states cannot be told apart from it."""
    return (scene.look, scene.ground, *sorted(_appearance(thing) for thing in scene.things))


def middle_scene(clip: Clip) -> Scene:
    """The scene that holds the middle one of eight sampled frames (the fifth, as the static ablation takes it)."""
    total = clip_frames(clip)
    return clip[round(4 * (total - 1) / 7) * len(clip) // total]


def clip_frames(clip: Clip) -> int:
    """Frames of a clip: 32, or 16 for each scene of several."""
    return FRAMES if len(clip) == 1 else len(clip) * FRAMES // 2


def scene_times(clip: Clip) -> Iterator[tuple[Scene, int]]:
    """The scene and its frame of the 32 for every frame of the clip; long clips take every second one."""
    for scene in clip:
        for time in range(0, FRAMES, 1 if len(clip) == 1 else 2):
            yield scene, time


def shuffled_state(clip: Clip) -> tuple[object, ...]:
    """All that the eight sampled frames tell when their order is lost."""
    timeline = list(scene_times(clip))
    sampled = [timeline[round(i * (len(timeline) - 1) / 7)] for i in range(8)]
    return tuple(sorted((_frame_state(scene, time) for scene, time in sampled), key=repr))


def _frame_state(scene: Scene, time: int) -> tuple[object, ...]:
    """What one frame shows, in whole pixels."""
    things = [(_appearance(thing), _rounded(thing_pose(thing, time))) for thing in scene.things]
    return (scene.look, scene.ground, _rounded(view_pose(scene, time)), *sorted(things))


def _rounded(pose: Pose) -> tuple[float, ...]:
    # A thing that is not to be seen is nowhere in particular; + 0.0 makes -0.0 the same as 0.0.
    return (round(pose.dx) + 0.0, round(pose.dy) + 0.0, round(pose.scale, 1)) if pose.visible else ()


def shows(scene: Scene, picture: Scene, time: int, tolerance_px: float = 4.0) -> bool:
    """Whether some frame of `scene` looks like frame `time` of `picture`, up to shifts nobody can be asked to see."""
    if still_state(scene) != still_state(picture):
        return False
    order = sorted(range(len(scene.things)), key=lambda i: _appearance(scene.things[i]))
    wanted = [picture.things[i] for i in sorted(range(len(order)), key=lambda i: _appearance(picture.things[i]))]
    found = [scene.things[i] for i in order]

    def looks_alike(at: int) -> bool:
        poses = [(view_pose(scene, at), view_pose(picture, time))]
        poses += [(thing_pose(a, at), thing_pose(b, time)) for a, b in zip(found, wanted, strict=True)]
        return all(_near(a, b, tolerance_px) for a, b in poses)

    return any(looks_alike(at) for at in range(FRAMES))


def _appearance(thing: Thing) -> tuple[str, str, str, Place]:
    return thing.color, thing.shape, thing.size, thing.place


def _near(one: Pose, other: Pose, tolerance_px: float) -> bool:
    if not one.visible and not other.visible:
        return True
    same = one.visible == other.visible and abs(one.scale - other.scale) <= 0.1
    return same and math.hypot(one.dx - other.dx, one.dy - other.dy) <= tolerance_px
