"""Logical forms: what a caption claims, and the checker that says whether a scene makes the claim true.

A form has variables (nouns) and facts about them; it holds in a scene if the variables can be given different things
of the scene so that every fact is true. Relevance in the mini UVRB is this checker run over the whole gallery, so
every positive of a query is listed, planned or not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from gve.toy.scenes import COOL, WARM, Clip, Scene, Thing


@dataclass(frozen=True)
class Noun:
    """A variable: a thing of this shape, colour and size; an empty word leaves it open."""

    color: str = ""
    shape: str = ""
    size: str = ""

    def fits(self, thing: Thing) -> bool:
        return (
            (not self.color or self.color == thing.color)
            and (not self.shape or self.shape == thing.shape)
            and (not self.size or self.size == thing.size)
        )

    def __or__(self, other: Noun) -> Noun:
        return Noun(self.color or other.color, self.shape or other.shape, self.size or other.size)


@dataclass(frozen=True)
class Fact:
    """One claim.

    Args:
        kind: a key of TESTS.
        value: what is claimed, by kind.
        who: the variables it is about.
    """

    kind: str
    value: Any = None
    who: tuple[int, ...] = ()


@dataclass(frozen=True)
class Form:
    """A conjunction of facts about some nouns in one scene."""

    nouns: tuple[Noun, ...] = ()
    facts: tuple[Fact, ...] = ()

    def __or__(self, other: Form) -> Form:
        """Both claims at once; equal places among the nouns are the same variable."""
        count = max(len(self.nouns), len(other.nouns))
        mine = self.nouns + (Noun(),) * (count - len(self.nouns))
        others = other.nouns + (Noun(),) * (count - len(other.nouns))
        return Form(tuple(a | b for a, b in zip(mine, others, strict=True)), self.facts + other.facts)


Story = tuple[Form, ...]  # what a clip's scenes show, in order


def holds(form: Form, scene: Scene) -> bool:
    """Whether the scene makes the form true."""
    candidates = []
    for noun in form.nouns:
        candidates.append([thing for thing in scene.things if noun.fits(thing)])
        if not candidates[-1]:  # most pairs of a query and a clip end here
            return False
    if not all(TESTS[fact.kind](scene, (), fact.value) for fact in form.facts if not fact.who):
        return False
    bound = [fact for fact in form.facts if fact.who]
    return any(
        len({id(thing) for thing in things}) == len(things)
        and all(TESTS[fact.kind](scene, [things[i] for i in fact.who], fact.value) for fact in bound)
        for things in product(*candidates)
    )


def tells(story: Story, clip: Clip) -> bool:
    """Whether the clip's scenes make the story's forms true, one by one in order."""
    return len(story) == len(clip) and all(holds(form, scene) for form, scene in zip(story, clip, strict=True))


def palette(scene: Scene) -> str:
    """The word "warm" or "cool" if every thing is, else "mixed"."""
    colors = {thing.color for thing in scene.things}
    return "warm" if colors <= set(WARM) else "cool" if colors <= set(COOL) else "mixed"


def density(scene: Scene) -> str:
    """The word "sparse" for one thing, "crowded" for four or more, else "moderate"."""
    count = len(scene.things)
    return "sparse" if count == 1 else "crowded" if count >= 4 else "moderate"


def pace(scene: Scene) -> str:
    """The word "calm" if at most one thing happens, "busy" from four on, else "steady"."""
    count = sum(len(thing.events) for thing in scene.things)
    return "calm" if count <= 1 else "busy" if count >= 4 else "steady"


def _in_order(things: Sequence[Thing], events: Sequence[str]) -> bool:
    """Whether there are ever later slots in which each of the things does its event."""
    slot = 0
    for thing, event in zip(things, events, strict=True):
        try:
            slot = thing.course.index(event, slot) + 1
        except ValueError:
            return False
    return True


Test = Callable[[Scene, Sequence[Thing], Any], bool]
TESTS: dict[str, Test] = {
    "at": lambda scene, who, place: who[0].place == place,
    "left of": lambda scene, who, _: who[0].place[0] < who[1].place[0],
    "right of": lambda scene, who, _: who[0].place[0] > who[1].place[0],
    "above": lambda scene, who, _: who[0].place[1] < who[1].place[1],
    "below": lambda scene, who, _: who[0].place[1] > who[1].place[1],
    "does": lambda scene, who, event: event in who[0].events,
    "rests": lambda scene, who, _: not who[0].events,
    "course": lambda scene, who, events: who[0].events == events,
    "order": lambda scene, who, events: _in_order(who, events),
    "camera": lambda scene, who, moves: scene.camera == moves,
    "ground": lambda scene, who, ground: scene.ground == ground,
    "tone": lambda scene, who, tone: scene.ground[0] == tone,
    "pattern": lambda scene, who, pattern: scene.ground[1] == pattern,
    "count": lambda scene, who, count: len(scene.things) == count,
    "palette": lambda scene, who, value: palette(scene) == value,
    "density": lambda scene, who, value: density(scene) == value,
    "pace": lambda scene, who, value: pace(scene) == value,
    "any color": lambda scene, who, color: any(thing.color == color for thing in scene.things),
    "any shape": lambda scene, who, shape: any(thing.shape == shape for thing in scene.things),
    "any event": lambda scene, who, event: any(event in thing.events for thing in scene.things),
    "any move": lambda scene, who, move: move in scene.camera,
}
