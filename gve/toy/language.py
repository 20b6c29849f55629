"""Words and phrases of the two dialects. Dialect A is trained on; B has other wording for the same facts.

Phrases are made from the words of a form only, never from the scene: a sentence claims what its form claims.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gve.toy.forms import Noun
from gve.toy.scenes import Place

_ROWS = {"A": ("top", "middle", "bottom"), "B": ("upper", "middle", "lower")}


@dataclass(frozen=True)
class Dialect:
    """A wording.

    Args:
        shapes, colors, sizes: other words than the plain ones.
        verbs: third person of every event and slide.
        relations: how one thing stands to another.
        moves: third person of every camera move.
        patterns: the ground as a phrase, with {tone}.
        themes: adjectives of pace, density and palette.
        thing: a thing of unknown shape.
        place: the place phrase, with {row} and {side}.
    """

    name: str
    verbs: Mapping[str, str]
    relations: Mapping[str, str]
    moves: Mapping[str, str]
    patterns: Mapping[str, str]
    themes: Mapping[str, str]
    thing: str
    place: str
    shapes: Mapping[str, str]
    colors: Mapping[str, str]
    sizes: Mapping[str, str]

    def noun(self, noun: Noun, article: str = "a") -> str:
        """A noun phrase: "a large red circle", "the circle"."""
        words = [
            self.sizes.get(noun.size, noun.size),
            self.colors.get(noun.color, noun.color),
            self.shapes.get(noun.shape, noun.shape) or self.thing,
        ]
        phrase = " ".join(word for word in words if word)
        if article == "a" and phrase[0] in "aeiou":
            article = "an"
        return f"{article} {phrase}"

    def at(self, place: Place) -> str:
        """A place phrase: "at the top left", "in the centre"."""
        column, row = place
        if place == (1, 1):
            return "in the centre"
        side = ("left", "middle", "right")[column]
        return self.place.format(row=_ROWS[self.name][row], side=side)

    def ground(self, ground: tuple[str, str]) -> str:
        """A ground phrase: "on a grey striped background"."""
        phrase = self.patterns[ground[1]].format(tone=ground[0])
        return phrase.replace(" a olive", " an olive")

    def camera(self, moves: tuple[str, str]) -> str:
        """A verb phrase: "pans left and then zooms in"."""
        first, second = (self.moves[move] for move in moves)
        return first if first == second else f"{first} and then {second}"

    def does(self, events: Sequence[str]) -> str:
        """A verb phrase: "hops left and blinks"."""
        return join([self.verbs[event] for event in events])


def join(phrases: Sequence[str], last: str = "and") -> str:
    """An enumeration: "a", "a and b", "a, b and c"."""
    if len(phrases) < 2:
        return "".join(phrases)
    return f"{', '.join(phrases[:-1])} {last} {phrases[-1]}"


def sentence(text: str) -> str:
    """With a capital and a full stop."""
    return f"{text[0].upper()}{text[1:]}."


DIALECTS = {
    "A": Dialect(
        name="A",
        verbs={
            **{f"hop {way}": f"hops {way}" for way in ("left", "right", "up", "down")},
            **{f"slide {way}": f"slides {way}" for way in ("left", "right", "up", "down")},
            "blink": "blinks",
            "swell": "swells",
            "shrink": "shrinks",
            "": "stays at rest",
        },
        relations={"left of": "left of", "right of": "right of", "above": "above", "below": "below"},
        moves={
            "pan left": "pans left",
            "pan right": "pans right",
            "tilt up": "tilts up",
            "tilt down": "tilts down",
            "zoom in": "zooms in",
            "zoom out": "zooms out",
            "shake": "shakes",
            "still": "holds still",
        },
        patterns={
            "plain": "on a plain {tone} background",
            "striped": "on a {tone} striped background",
            "checked": "on a {tone} checked background",
            "dotted": "on a {tone} dotted background",
        },
        themes={
            "calm": "calm",
            "busy": "busy",
            "sparse": "sparse",
            "moderate": "moderately filled",
            "crowded": "crowded",
            "warm": "warm colours",
            "cool": "cool colours",
            "mixed": "both warm and cool colours",
        },
        thing="shape",
        place="at the {row} {side}",
        shapes={},
        colors={},
        sizes={},
    ),
    "B": Dialect(
        name="B",
        verbs={
            "hop left": "jumps to the left",
            "hop right": "jumps to the right",
            "hop up": "jumps upwards",
            "hop down": "jumps downwards",
            "slide left": "glides to the left",
            "slide right": "glides to the right",
            "slide up": "glides upwards",
            "slide down": "glides downwards",
            "blink": "flashes off and on",
            "swell": "gets bigger for a moment",
            "shrink": "gets smaller for a moment",
            "": "does not move",
        },
        relations={
            "left of": "to the left of",
            "right of": "to the right of",
            "above": "higher than",
            "below": "lower than",
        },
        moves={
            "pan left": "turns to the left",
            "pan right": "turns to the right",
            "tilt up": "turns upwards",
            "tilt down": "turns downwards",
            "zoom in": "goes closer",
            "zoom out": "goes further away",
            "shake": "trembles",
            "still": "does not move",
        },
        patterns={
            "plain": "in front of a plain {tone} wall",
            "striped": "in front of a {tone} wall with stripes",
            "checked": "in front of a {tone} wall with checks",
            "dotted": "in front of a {tone} wall with dots",
        },
        themes={
            "calm": "quiet",
            "busy": "lively",
            "sparse": "nearly empty",
            "moderate": "half full",
            "crowded": "packed",
            "warm": "warm tones",
            "cool": "cool tones",
            "mixed": "a mix of warm and cool tones",
        },
        thing="figure",
        place="in the {row} {side}",
        shapes={"circle": "disc", "square": "box", "cross": "plus sign", "ring": "hoop"},
        colors={"purple": "violet", "cyan": "turquoise"},
        sizes={"large": "big", "small": "little"},
    ),
}
