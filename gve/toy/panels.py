"""Panels for composed queries: sixteen clips that cross four identities with four changes.

The reference picture or clip shows the identity, the text tells the change; exactly one clip of the panel has both,
three have only the identity, three only the change. So a judge of one side alone is right one time in four.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from gve.toy.captions import Teller
from gve.toy.families import Maker, with_events
from gve.toy.forms import Fact, Form, Noun, holds
from gve.toy.language import DIALECTS
from gve.toy.render import Shot, Still
from gve.toy.scenes import CAMERA_MOVES, COLORS, EVENTS, PICTURE_FRAME, SHAPES, TONES, Clip, Scene, Thing

SIDE = 4  # identities and changes of a panel


@dataclass(frozen=True)
class Composed:
    """One composed query over the clips of its panel, by their index in it.

    Args:
        identity: what the reference tells, `change` what the text tells; the positive is the one clip where both hold.
    """

    text: str
    identity: Form
    change: Form
    positive: int
    fits_text_only: tuple[int, ...]
    fits_media_only: tuple[int, ...]
    fits_neither: tuple[int, ...]
    image: Still | None = None
    video: Shot | None = None


@dataclass(frozen=True)
class Panel:
    """Sixteen clips and their sixteen queries."""

    clips: tuple[Clip, ...]
    queries: tuple[Composed, ...]


@dataclass(frozen=True)
class _Cross:
    """What a kind of panel is made of.

    Args:
        scene: the scene of (identity, change).
        identity, change: forms by index.
        text: the change in words.
        reference: the scene that shows the identity under another change.
    """

    scene: Callable[[int, int], Scene]
    identity: Callable[[int], Form]
    change: Callable[[int], Form]
    text: Callable[[int, Teller], str]
    reference: Callable[[int], Scene]


def _main(color: str, shape: str) -> Thing:
    return Thing(color, shape, "large", (1, 1))


def _combinations(make: Maker, count: int) -> list[tuple[str, str]]:
    return list(zip(make.pick(COLORS, count), make.pick(SHAPES, count), strict=True))


def _named(color: str, shape: str) -> Form:
    return Form((Noun(color, shape),))


def _action(make: Maker) -> _Cross:
    """The shape of the reference, another action."""
    objects, happenings = _combinations(make, SIDE), make.pick(EVENTS, SIDE + 1)
    ground, nuisance = make.ground(), make.random.randrange(1 << 30)

    def scene(identity: int, change: int) -> Scene:
        course = (happenings[change],) * 4
        return Scene((replace(_main(*objects[identity]), course=course),), ground, look=make.look, nuisance=nuisance)

    def text(change: int, teller: Teller) -> str:
        verb = teller.dialect.verbs[happenings[change]]
        return teller.one(["the same shape, now it {}", "it {}"] if teller.terse else ["this one, but it {}"]).format(
            verb
        )

    return _Cross(
        scene,
        lambda i: _named(*objects[i]),
        lambda c: Form((Noun(),), (Fact("does", happenings[c], (0,)),)),
        text,
        lambda i: scene(i, SIDE),
    )


def _setting(make: Maker) -> _Cross:
    """The shape of the reference on another ground."""
    objects, tones = _combinations(make, SIDE), make.pick(TONES, SIDE + 1)
    patterns = [make.ground()[1] for _ in tones]
    grounds = list(zip(tones, patterns, strict=True))
    nuisance = make.random.randrange(1 << 30)

    def scene(identity: int, change: int) -> Scene:
        return Scene((_main(*objects[identity]),), grounds[change], look=make.look, nuisance=nuisance)

    def text(change: int, teller: Teller) -> str:
        phrase = teller.dialect.ground(grounds[change])
        return teller.one(["the same shape {}", "it stands {}"] if teller.terse else ["this one {}"]).format(phrase)

    return _Cross(
        scene,
        lambda i: _named(*objects[i]),
        lambda c: Form((), (Fact("ground", grounds[c]),)),
        text,
        lambda i: scene(i, SIDE),
    )


def _partner(make: Maker) -> _Cross:
    """The shape of the reference together with another one."""
    objects = _combinations(make, SIDE)
    shapes = [s for s in SHAPES if s not in {shape for _, shape in objects}]
    colors = make.pick(COLORS, SIDE)
    # Two shapes are left for four partners: the colour, or the shape, tells them apart from each other and from all.
    partners = [(color, shapes[i % len(shapes)]) for i, color in enumerate(colors)]
    ground, nuisance = make.ground(), make.random.randrange(1 << 30)
    place = make.one([(0, 0), (2, 0), (0, 2), (2, 2)])

    def scene(identity: int, change: int) -> Scene:
        things = (_main(*objects[identity]), Thing(*partners[change], "large", place))
        return Scene(things, ground, look=make.look, nuisance=nuisance)

    def text(change: int, teller: Teller) -> str:
        phrase = teller.dialect.noun(Noun(*partners[change]))
        choices = ["the same shape together with {}", "and {} beside it"] if teller.terse else ["this one joined by {}"]
        return teller.one(choices).format(phrase)

    return _Cross(
        scene,
        lambda i: _named(*objects[i]),
        lambda c: Form((Noun(), Noun(*partners[c]))),
        text,
        lambda i: Scene((_main(*objects[i]),), ground, look=make.look, nuisance=nuisance),
    )


def _performer(make: Maker) -> _Cross:
    """The action of the reference clip, done by another shape."""
    objects, happenings = _combinations(make, SIDE + 1), make.pick(EVENTS, SIDE)
    ground, nuisance = make.ground(), make.random.randrange(1 << 30)

    def scene(identity: int, change: int) -> Scene:
        course = (happenings[identity],) * 4
        return Scene((replace(_main(*objects[change]), course=course),), ground, look=make.look, nuisance=nuisance)

    def text(change: int, teller: Teller) -> str:
        phrase = teller.dialect.noun(Noun(*objects[change]))
        choices = ["the same action by {}", "the same, but with {}"] if teller.terse else ["just so, done by {}"]
        return teller.one(choices).format(phrase)

    return _Cross(
        scene,
        lambda i: Form((Noun(),), (Fact("does", happenings[i], (0,)),)),
        lambda c: _named(*objects[c]),
        text,
        lambda i: scene(i, SIDE),
    )


def _filmed(make: Maker) -> _Cross:
    """The scene of the reference clip under another camera."""
    objects, moves = _combinations(make, SIDE), make.pick(CAMERA_MOVES, SIDE)
    ground, nuisance = (make.one(TONES), make.one(("striped", "checked", "dotted"))), make.random.randrange(1 << 30)
    event = make.one(("blink", "swell", "shrink"))

    def scene(identity: int, change: int) -> Scene:
        things = (with_events(_main(*objects[identity]), (0, event)),)
        move = moves[change] if change < SIDE else "still"
        return Scene(things, ground, (move, move), make.look, nuisance)

    def text(change: int, teller: Teller) -> str:
        verb = teller.dialect.moves[moves[change]]
        choices = ["the same scene, but the camera {}", "now the camera {}"]
        return teller.one(choices if teller.terse else ["this scene while the camera {}"]).format(verb)

    return _Cross(
        scene,
        lambda i: _named(*objects[i]),
        lambda c: Form((), (Fact("camera", (moves[c], moves[c])),)),
        text,
        lambda i: scene(i, SIDE),
    )


KINDS: dict[str, tuple[Callable[[Maker], _Cross], ...]] = {
    "TI": (_action, _setting, _partner),
    "TV": (_action, _performer, _filmed),
    "still": (_setting, _partner),  # changes that a still picture shows
}


def panel_queries(
    modality: str,
    count: int,
    seed: str,
    *,
    look: str = "A",
    refuse: Callable[[Clip], bool] = lambda clip: False,
) -> Iterator[Panel]:
    """Draw panels for queries of text and image ("TI") or text and video ("TV").

    Args:
        modality: a key of KINDS; "still" has queries of text and image, and changes that a still picture shows.
        refuse: a panel with a clip or a reference of which this is true is left out.
    """
    make = Maker(seed, look)
    teller = Teller(DIALECTS[look], random.Random(f"{seed}-words"))
    found = 0
    while found < count:
        cross = KINDS[modality][found % len(KINDS[modality])](make)
        references = [cross.reference(i) for i in range(SIDE)]
        clips = tuple((cross.scene(i, c),) for i in range(SIDE) for c in range(SIDE))
        if any(refuse(clip) for clip in (*clips, *((scene,) for scene in references))):
            continue
        found += 1
        queries = []
        for row in range(SIDE * SIDE):
            identity, change = divmod(row, SIDE)
            queries.append(_compose(cross, clips, identity, change, references[identity], modality, teller))
        yield Panel(clips, tuple(queries))


def _compose(
    cross: _Cross, clips: tuple[Clip, ...], identity: int, change: int, reference: Scene, modality: str, teller: Teller
) -> Composed:
    media, text = cross.identity(identity), cross.change(change)
    by_media = [holds(media, clip[0]) for clip in clips]
    by_text = [holds(text, clip[0]) for clip in clips]
    sides = list(zip(by_text, by_media, strict=True))
    both = [row for row, side in enumerate(sides) if side == (True, True)]
    if len(both) != 1:
        raise AssertionError(f"a panel has {len(both)} clips for one query: {media} and {text}")
    return Composed(
        cross.text(change, teller),
        media,
        text,
        both[0],
        tuple(row for row, side in enumerate(sides) if side == (True, False)),
        tuple(row for row, side in enumerate(sides) if side == (False, True)),
        tuple(row for row, side in enumerate(sides) if side == (False, False)),
        None if modality == "TV" else Still(reference, PICTURE_FRAME),
        Shot((reference,)) if modality == "TV" else None,
    )
