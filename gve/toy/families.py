"""Foil groups: small families of clips that agree in everything but the ability under test.

A test set's gallery is made of such groups, so that a query cannot be answered by an ability the set is not named
after; training sources take their hard negatives from the same group. Training never sees the held-out combinations
of colour and shape and the held-out successions of events.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TypeVar

from gve.toy.scenes import (
    CAMERA_MOVES,
    COLORS,
    COOL,
    DIRECTIONS,
    EVENTS,
    HOPS,
    NO_COURSE,
    PATTERNS,
    REST,
    SHAPES,
    SIZES,
    STILL_CAMERA,
    TONES,
    WARM,
    Clip,
    Course,
    Place,
    Scene,
    Thing,
)

Group = tuple[Clip, ...]
Choice = TypeVar("Choice")

HELD_OUT_ORDERS = {("hop left", "hop up"), ("blink", "swell")}
LOOK_ALIKE = {frozenset(pair) for pair in (("black", "navy"), ("black", "brown"), ("brown", "olive"))}
ROW = ((0, 1), (1, 1), (2, 1))
COLUMN = ((1, 0), (1, 1), (1, 2))
CELLS = tuple((column, row) for row in range(3) for column in range(3))


def held_out(color: str, shape: str) -> bool:
    """Whether training never shows this colour on this shape: 6 of the 48 combinations, one per shape."""
    return (COLORS.index(color) + 3 * SHAPES.index(shape)) % 8 == 0


def is_held_out(clip: Clip) -> bool:
    """Whether the clip shows a combination or a succession of events that training leaves out."""
    for scene in clip:
        if any(held_out(thing.color, thing.shape) for thing in scene.things):
            return True
        events = [thing.course[slot] for slot in range(4) for thing in scene.things if thing.course[slot]]
        if any(pair in HELD_OUT_ORDERS for pair in pairwise(events)):
            return True
    return False


class Maker:
    """Draws scenes of one dialect from one seed."""

    def __init__(self, seed: str, look: str = "A"):
        self.random = random.Random(seed)
        self.look = look

    def pick(self, choices: Sequence[Choice], count: int) -> list[Choice]:
        return self.random.sample(list(choices), count)

    def one(self, choices: Sequence[Choice]) -> Choice:
        return self.random.choice(list(choices))

    def things(self, places: Sequence[Place], sizes: Sequence[str]) -> tuple[Thing, ...]:
        """Things of different colours and different shapes, so that colour alone and shape alone name each."""
        colors, shapes = self.pick(COLORS, len(places)), self.pick(SHAPES, len(places))
        return tuple(Thing(*words) for words in zip(colors, shapes, sizes, places, strict=True))

    def ground(self, patterns: Sequence[str] = PATTERNS) -> tuple[str, str]:
        return self.one(TONES), self.one(patterns)

    def other_ground(self, ground: tuple[str, str]) -> tuple[str, str]:
        """Another tone, one that is easy to tell from the first, and the same pattern."""
        tones = [t for t in TONES if t != ground[0] and frozenset((t, ground[0])) not in LOOK_ALIKE]
        return self.one(tones), ground[1]

    def scene(
        self, things: tuple[Thing, ...], ground: tuple[str, str] | None = None, camera: tuple[str, str] = STILL_CAMERA
    ) -> Scene:
        return Scene(things, ground or self.ground(), camera, self.look, self.random.randrange(1 << 30))


def legal_events(place: Place, taken: Sequence[Place] = ()) -> list[str]:
    """Events a thing can do at a place: a hop stays in the picture and off the other things' cells."""
    legal = [event for event in EVENTS if event not in HOPS]
    for name, (x, y) in DIRECTIONS.items():
        cell = (place[0] + x, place[1] + y)
        if min(cell) >= 0 and max(cell) <= 2 and cell not in taken:
            legal.append(f"hop {name}")
    return sorted(legal)


def with_events(thing: Thing, *events: tuple[int, str]) -> Thing:
    """The thing with a course of just these (slot, event)."""
    course = [REST] * 4
    for slot, event in events:
        course[slot] = event
    return replace(thing, course=(course[0], course[1], course[2], course[3]))


def changed(scene: Scene, which: int, thing: Thing) -> Scene:
    """The scene with one thing replaced."""
    return replace(scene, things=(*scene.things[:which], thing, *scene.things[which + 1 :]))


def coarse(make: Maker) -> Group:
    """The same object, five main events. Slides pass through the middle, so the middle frame tells none of them."""
    corners = make.pick([(0, 0), (2, 0), (0, 2), (2, 2)], make.random.randint(0, 1))
    scene = make.scene(make.things([(1, 1), *corners], ["large"] + ["small"] * len(corners)))
    main = scene.things[0]
    slides = [replace(main, slide=(way, way)) for way in DIRECTIONS]
    stays = [replace(main, course=(event,) * 4) for event in EVENTS]
    slides, stays = make.pick(slides, 2), make.pick(stays, 3)
    return tuple((changed(scene, 0, thing),) for thing in slides + stays)


def paragraph(make: Maker) -> Group:
    """Two objects and three events; the foils have one event replaced, or the last one missing."""
    places = [ROW[0], ROW[2]] if make.random.random() < 0.5 else [COLUMN[0], COLUMN[2]]
    scene = make.scene(make.things(places, ["large", "large"]))
    first, second = scene.things
    a, b, a_other = make.pick(legal_events(first.place), 3)
    c, c_other, c_third = make.pick(legal_events(second.place), 3)

    def told(one: str, two: str, three: str) -> Clip:
        things = with_events(first, (0, one), (1, two)), with_events(second, (3, three))
        return (replace(scene, things=things),)

    return told(a, b, c), told(a_other, b, c), told(a, b, c_other), told(a, b, c_third), told(a, b, REST)


def care(make: Maker) -> Group:
    """Two arrangements of two objects (places or colours swapped) times four orders of events (one repeats a move)."""
    across = make.random.random() < 0.5
    places = [ROW[0], ROW[2]] if across else [COLUMN[0], COLUMN[2]]
    scene = make.scene(make.things(places, ["large", "large"]))
    hops = ["hop up", "hop down"] if across else ["hop left", "hop right"]  # legal on both sides
    x, y, z = make.pick([*hops, "blink", "swell", "shrink"], 3)
    one, other = scene.things
    if make.random.random() < 0.5:
        swapped = replace(one, place=other.place), replace(other, place=one.place)
    else:
        swapped = replace(one, color=other.color), replace(other, color=one.color)
    plain = ((0, x), (1, y), (0, z))
    orders = [plain, (plain[1], plain[0], plain[2]), plain[::-1], (plain[0], plain[1], plain[0])]
    group = []
    for things in ((one, other), swapped):
        for order in orders:
            slots = (0, 1, make.random.randint(2, 3))
            told = [
                with_events(
                    thing, *((slot, event) for slot, (who, event) in zip(slots, order, strict=True) if who == i)
                )
                for i, thing in enumerate(things)
            ]
            group.append((replace(scene, things=tuple(told)),))
    return tuple(group)


def detail(make: Maker) -> Group:
    """A large object among small ones; the foils change its colour, its shape, its place or its event."""
    cells = make.pick(CELLS, 4)
    count = make.random.randint(2, 3)
    things = list(make.things(cells[:count], ["large"] + ["small"] * (count - 1)))
    free = cells[3]
    shared = sorted(set(legal_events(cells[0], cells[:count])) & set(legal_events(free, cells[:count])))
    event, other_event = make.pick(shared, 2)
    things[0] = with_events(things[0], (1, event), (2, event))
    things[1] = with_events(things[1], (0, make.one(["blink", "swell"])))
    scene = make.scene(tuple(things))
    main = scene.things[0]
    color = make.one([c for c in COLORS if c not in {thing.color for thing in things}])
    shape = make.one([s for s in SHAPES if s not in {thing.shape for thing in things}])
    foils = (
        main,
        replace(main, color=color),
        replace(main, shape=shape),
        replace(main, place=free),
        with_events(main, (1, other_event), (2, other_event)),
    )
    return tuple((changed(scene, 0, thing),) for thing in foils)


def camera(make: Maker) -> Group:
    """One scene under four cameras, and one where the objects move as if the camera did, over a ground that stays."""
    cameras = [(move, move) for move in make.pick(CAMERA_MOVES, 3)]
    first, second = make.pick([*CAMERA_MOVES, "still"], 2)
    return _filmed(make, make.ground(PATTERNS[1:]), [*cameras, (first, second)], 1)


def many_cameras(make: Maker) -> Group:
    """Two scenes on one ground, seventeen cameras and four mimics each: more than the ten places that R@10 looks at.

    Five of the cameras film both scenes, so that their captions have two positives.
    """
    ground = make.ground(PATTERNS[1:])
    every = [(first, second) for first in (*CAMERA_MOVES, "still") for second in (*CAMERA_MOVES, "still")]
    steady = [moves for moves in every if moves[0] == moves[1] != "still"]
    changing = make.pick([moves for moves in every if moves[0] != moves[1]], 22)
    drawn = make.pick(steady + changing, 29)
    return _filmed(make, ground, drawn[:17], 4) + _filmed(make, ground, drawn[12:], 4)


def _filmed(make: Maker, ground: tuple[str, str], moves: Sequence[tuple[str, str]], mimics: int) -> Group:
    places = make.pick(make.one([ROW, COLUMN]), make.random.randint(1, 2))
    scene = make.scene(make.things(places, ["large"] * len(places)), ground)
    sliding = [
        replace(scene, things=tuple(replace(thing, slide=(way, way)) for thing in scene.things))
        for way in make.pick(list(DIRECTIONS), mimics)
    ]
    return (*((replace(scene, camera=pair),) for pair in moves), *((mimic,) for mimic in sliding))


def events(make: Maker) -> Group:
    """Five clips of the same three objects, six events each: an event belongs to one or two of the five."""
    places = [ROW[0], ROW[2], make.one([COLUMN[0], COLUMN[2]])]
    scene = make.scene(make.things(places, [make.one(SIZES) for _ in places]))
    decks: list[list[str]] = []
    for thing in scene.things:
        legal = legal_events(thing.place, places)
        deck: list[str] = []
        while len(deck) < 10:  # every event comes once before any comes again
            deck += [event for event in make.pick(legal, len(legal)) if event not in deck[-1:]]
        decks.append(deck)
    group = []
    for clip in range(5):
        told = []
        for thing, deck in zip(scene.things, decks, strict=True):
            slots = sorted(make.pick(range(4), 2))
            told.append(with_events(thing, (slots[0], deck[2 * clip]), (slots[1], deck[2 * clip + 1])))
        group.append((replace(scene, things=tuple(told)),))
    return tuple(group)


def theme(make: Maker) -> Group:
    """One scene, and foils of another palette, density, pace and ground that keep its objects."""
    cells = make.pick(CELLS, 5)
    counts = {"sparse": 1, "moderate": make.random.randint(2, 3), "crowded": make.random.randint(4, 5)}
    kinds = {"warm": WARM, "cool": COOL, "mixed": COLORS}
    dense, other_dense = make.pick(list(counts), 2)
    one_thing = "sparse" in (dense, other_dense)  # one thing cannot be of both palettes
    kind, other_kind = make.pick(["warm", "cool"] if one_thing else list(kinds), 2)
    busy = make.random.random() < 0.5

    def paint(count: int, name: str) -> list[str]:
        colors = [make.one(kinds[name]) for _ in range(count)]
        if name == "mixed" and count > 1:
            colors[:2] = [make.one(WARM), make.one(COOL)]
        return colors

    def staged(count: int, name: str, lively: bool) -> tuple[Thing, ...]:
        staged_things = []
        for i, color in enumerate(paint(count, name)):
            quick = [make.one(["blink", "swell", "shrink"]) for _ in range(4)]
            course: Course = (quick[0], quick[1], quick[2], quick[3]) if lively else NO_COURSE
            staged_things.append(Thing(color, shapes[i], "large", cells[i], course))
        return tuple(staged_things)

    shapes = make.pick(SHAPES, 5)
    scene = make.scene(staged(counts[dense], kind, busy))
    repainted = tuple(
        replace(thing, color=color)
        for thing, color in zip(scene.things, paint(len(scene.things), other_kind), strict=True)
    )
    return (
        (scene,),
        (replace(scene, things=repainted),),
        (replace(scene, things=staged(counts[other_dense], kind, busy)),),
        (replace(scene, things=staged(counts[dense], kind, not busy)),),
        (replace(scene, ground=make.other_ground(scene.ground)),),
    )


def keywords(make: Maker) -> Group:
    """Two objects, a ground, an event and a camera move; each foil changes one keyword."""
    places = make.pick(ROW, 2)
    things = list(make.things(places, ["large", "large"]))
    event, other_event = make.pick(sorted({"blink", "swell", "shrink", "hop up", "hop down"}), 2)
    things[0] = with_events(things[0], (0, event), (3, event))
    move = make.one(["still", *CAMERA_MOVES])
    scene = make.scene(tuple(things), camera=(move, move))
    main, partner = scene.things
    color = make.one([c for c in COLORS if c not in (main.color, partner.color)])
    shape = make.one([s for s in SHAPES if s not in (main.shape, partner.shape)])
    return (
        (scene,),
        (changed(scene, 1, replace(partner, color=color)),),
        (changed(scene, 1, replace(partner, shape=shape)),),
        (changed(scene, 0, with_events(main, (0, other_event), (3, other_event))),),
        (replace(scene, ground=make.other_ground(scene.ground)),),
    )


def long(make: Maker) -> Group:
    """Five long videos of four or six scenes that share all scenes but one, each a different one of the same place."""
    count = make.one([4, 4, 4, 6])
    scenes = [_long_scene(make) for _ in range(count)]
    where = make.random.randrange(count)
    group = []
    for _ in range(5):
        own = _long_scene(make)
        group.append((*scenes[:where], own, *scenes[where + 1 :]))
    return tuple(group)


def _long_scene(make: Maker) -> Scene:
    places = make.pick(CELLS, 2)
    first, second = make.things(places, ["large", make.one(SIZES)])
    return make.scene((first, second))


def own_scenes(clips: Sequence[Clip]) -> list[int]:
    """For each clip the index of its first scene that none of the others has."""
    counts = Counter(scene for clip in clips for scene in clip)
    return [next(i for i, scene in enumerate(clip) if counts[scene] == 1) for clip in clips]


def groups(
    family: Callable[[Maker], Group],
    count: int,
    seed: str,
    *,
    look: str = "A",
    refuse: Callable[[Clip], bool] = lambda clip: False,
) -> Iterator[Group]:
    """Draw foil groups, no two of which show the same things on the same ground.

    Args:
        refuse: a group with a clip of which this is true is left out.

    Raises:
        ValueError: there are not as many different groups.
    """
    make = Maker(seed, look)
    taken: set[object] = set()
    found = 0
    for _ in range(count * 200):
        if found == count:
            return
        group = family(make)
        key = _key(group)
        if key in taken or len(set(group)) < len(group) or any(refuse(clip) for clip in group):
            continue
        taken.add(key)
        found += 1
        yield group
    if found < count:
        raise ValueError(f"only {found} of {count} groups of {family.__name__} differ; ask for fewer")


def _key(group: Group) -> object:
    scene = group[0][0]
    things = frozenset((thing.color, thing.shape) for thing in scene.things)
    return (scene.look, len(group[0]), things, scene.ground)
