"""Plants errors in true captions: so many claims of a text, and no others, are made false.

A word that carries meaning is replaced by another one of its kind, the text is read and judged again by the checker,
and the change stands only if it made claims false as planned. So what was planted is measured by the same rule that an
audit's judge is compared with, and a text stays one of the toy language.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from gve.toy.claims import Claim, judge, parse
from gve.toy.language import Dialect
from gve.toy.scenes import CAMERA_MOVES, COLORS, DIRECTIONS, EVENTS, PATTERNS, REST, SHAPES, SIZES, TONES, Clip

TRIES = 8
"""Other words that are tried at one place before it is left as it is."""


@dataclass(frozen=True)
class Told:
    """A text and what the checker says of it.

    Args:
        text: as it is told.
        claims: what it claims.
        verdicts: of each claim: true, false, or None for an order that cannot be judged.
    """

    text: str
    claims: tuple[Claim, ...]
    verdicts: tuple[bool | None, ...]

    @classmethod
    def read(cls, text: str, clip: Clip) -> Told:
        claims = parse(text).claims
        return cls(text, claims, tuple(judge(claims, clip)))

    @property
    def made(self) -> int:
        """Claims that are true or false."""
        return sum(verdict is not None for verdict in self.verdicts)

    @property
    def false(self) -> tuple[Claim, ...]:
        return tuple(claim for claim, true in zip(self.claims, self.verdicts, strict=True) if true is False)


def flip(text: str, clip: Clip, share: float, chance: random.Random, dialect: Dialect) -> Told:
    """A text of which each claim was made false with a probability.

    How many is drawn first, then where. A text of few words may not hold as many lies as were drawn; then it holds as
    many as it can.

    Args:
        text: a true caption of the clip.
        clip: what it is judged by.
        share: probability of each claim, 0 to 1.
        chance: of all draws.
        dialect: of the text.
    """
    told = Told.read(text, clip)
    wanted = len(told.false) + sum(chance.random() < share for verdict in told.verdicts if verdict)
    unread = len(parse(text).unparsed)
    for places in _shuffled(_places(text, _books(dialect)), chance):
        if len(told.false) >= wanted:
            break
        for other in chance.sample(places.others, min(TRIES, len(places.others))):
            tried = Told.read(places.replaced(told.text, other), clip)
            more = len(tried.false) - len(told.false)
            if 0 < more <= wanted - len(told.false) and len(parse(tried.text).unparsed) == unread:
                told = tried
                break
    return told


@dataclass(frozen=True)
class _Places:
    """A phrase, wherever the text has it, and what could stand there instead.

    Args:
        phrase: as it stands in the text.
        after, before: what must stand around it: a colour belongs to the shape that follows it, so that one thing is
            told of in one way all through the text.
        others: of its kind and dialect.
    """

    phrase: str
    others: tuple[str, ...]
    after: str = ""
    before: str = ""

    def replaced(self, text: str, other: str) -> str:
        if other.startswith(("a", "e", "i", "o", "u")) != self.phrase.startswith(("a", "e", "i", "o", "u")):
            article, wrong = ("an", "a") if other[0] in "aeiou" else ("a", "an")
            before = rf"\b{wrong} (?={re.escape(self.phrase)} ?{re.escape(self.before)}\b)"
            text = re.sub(before, f"{article} ", text, flags=re.IGNORECASE)
        around = rf"(?<!\w){re.escape(self.after)}{re.escape(self.phrase)}(?={re.escape(self.before)}(?!\w))"
        return re.sub(around, lambda found: _like(found.group(), self.after + other), text, flags=re.IGNORECASE)


def _like(found: str, other: str) -> str:
    """With a capital where the text had one."""
    return other[0].upper() + other[1:] if found[0].isupper() else other


def _places(text: str, books: Mapping[str, tuple[str, ...]]) -> Iterator[_Places]:
    colors, shapes = "|".join(books["color"]), "|".join(books["shape"])
    for color, shape in set(re.findall(rf"\b({colors}) ({shapes})\b", text, re.IGNORECASE)):
        yield _Places(color, _without(books["color"], color), before=f" {shape}")
        yield _Places(shape, _without(books["shape"], shape), after=f"{color} ")
    for kind, words in books.items():
        if kind in ("color", "shape") and "." in text:  # alone they stand in keywords only
            continue
        # The longest first: "at the top middle" before "middle", "pans left" and not "left".
        for word in set(re.findall(rf"(?<!\w)({'|'.join(words)})(?!\w)", text, re.IGNORECASE)):
            yield _Places(word, _without(words, word))


def _books(d: Dialect) -> Mapping[str, tuple[str, ...]]:
    """Phrases of one kind that can stand for each other, the longest first."""
    moves = [d.moves[move] for move in (*CAMERA_MOVES, "still")]
    slides = [f"slide {way}" for way in DIRECTIONS]
    books = {
        "color": [d.colors.get(word, word) for word in COLORS],
        "shape": [d.shapes.get(word, word) for word in SHAPES],
        "size": [d.sizes.get(word, word) for word in SIZES],
        "place": [d.at((column, row)) for column in range(3) for row in range(3)],
        "ground": [d.ground((tone, pattern)) for tone in TONES for pattern in PATTERNS],
        "tone": [f"{tone} background" for tone in TONES],
        "event": [d.verbs[event] for event in (*EVENTS, *slides, REST)],
        "move": moves,
        "relation": list(d.relations.values()),
        "count": [f"{word} shapes" for word in ("two", "three", "four", "five")],
        "density": [d.themes[word] for word in ("sparse", "moderate", "crowded")],
        "pace": [d.themes[word] for word in ("calm", "busy")],
        "palette": [d.themes[word] for word in ("warm", "cool", "mixed")],
    }
    return {kind: tuple(sorted(words, key=len, reverse=True)) for kind, words in books.items()}


def _without(words: Sequence[str], word: str) -> tuple[str, ...]:
    return tuple(other for other in words if other != word.lower())


def _shuffled(places: Iterator[_Places], chance: random.Random) -> list[_Places]:
    """In an order that follows from the chance alone."""
    ordered = sorted(places, key=lambda one: (one.phrase, one.after, one.before, one.others))
    chance.shuffle(ordered)
    return ordered
