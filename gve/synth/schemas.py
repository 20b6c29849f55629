"""What a reply must look like: the styles with their lengths, the JSON schema that binds them, and the word rules.

A schema cannot count words, and a model cannot either: what a schema lets pass is counted here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gve.items import InputError
from gve.synth.prompts import read_lexicon

CHARS_PER_WORD = 10
"""Room of a word in `maxLength`, its blank included; English has 6. Ends strings that would run on."""
TOKENS_PER_WORD = 3
"""Room of a word in `max_tokens`, JSON included; English takes 1.3 to 1.5."""

Words = tuple[int, int]
"""Fewest and most words."""


@dataclass(frozen=True)
class Style:
    """A slot of a reply.

    Args:
        key: of the JSON object.
        label: its name in prompts, configurations and results.
        fewest, most: words, both inclusive.
        asks: what it should be, for the prompt.
    """

    key: str
    label: str
    fewest: int
    most: int
    asks: str = ""

    def within(self, fewest: int, most: int) -> Style:
        return replace(self, fewest=fewest, most=most)


KEYWORDS = "keywords only"

VIDEO_STYLES = (
    Style("1", "concise", 10, 25, "one sentence with the main happening."),
    Style(
        "2",
        "spatio-temporal rich",
        80,
        200,
        "all that matters, in the order of time: who and what, how they look, where they stand, what they do and in "
        "which order, how the camera moves. Aim above 100 words.",
    ),
    Style("3", "abstract", 30, 100, "what the whole is about, its theme, mood and pace, without a list of details."),
    Style("4", KEYWORDS, 5, 30, "words and short phrases with commas between them, no sentence."),
    Style("5", "partially relevant", 10, 70, "only one part or aspect of the clip, in full; silent about the rest."),
)
"""The five styles of a clip with the ranges of gve.md section 6."""

FRAME_STYLES = (
    Style("1", "concise", 8, 25, "one sentence with the main subject."),
    Style("2", "detailed", 50, 150, "subject, looks, places and relations from the front to the background."),
    Style("3", "abstract", 15, 60, "what kind of scene it is, its theme, light and mood."),
    Style("4", KEYWORDS, 5, 30, "words and short phrases with commas between them, no sentence."),
    Style("5", "partially relevant", 10, 50, "only one thing or corner of the picture, in full."),
)
"""Five styles of a frame; the paper states none of their ranges, these are ours."""


def styles(defaults: Sequence[Style], words: Mapping[str, Words]) -> tuple[Style, ...]:
    """The styles, some with other ranges.

    Args:
        defaults: all of them.
        words: label -> fewest and most words.

    Raises:
        InputError: no such style, or a range that is none.
    """
    if unknown := set(words) - {style.label for style in defaults}:
        raise InputError(f"no style {min(unknown)!r}: use {', '.join(style.label for style in defaults)}")
    for label, bounds in words.items():
        check_words(label, bounds)
    return tuple(style.within(*words.get(style.label, (style.fewest, style.most))) for style in defaults)


def check_words(name: str, words: Words) -> None:
    """Raises InputError unless the range is one."""
    if not 1 <= words[0] <= words[1]:
        raise InputError(f"{name}: {words[0]} to {words[1]} words is no range: use at least 1, and no falling one")


def schema(slots: Sequence[Style]) -> dict[str, Any]:
    """JSON schema of an object with a text for each slot; flat, closed, every string bounded."""
    return {
        "type": "object",
        "properties": {
            slot.key: {
                "type": "string",
                "description": f"{slot.label}, {slot.fewest} to {slot.most} words",
                "minLength": 1,
                "maxLength": slot.most * CHARS_PER_WORD,
            }
            for slot in slots
        },
        "required": [slot.key for slot in slots],
        "additionalProperties": False,
    }


def room(slots: Sequence[Style]) -> int:
    """`max_tokens` of a reply to these slots."""
    return 64 + TOKENS_PER_WORD * sum(slot.most for slot in slots)


def tidy(text: str) -> str:
    """The text on one line, blanks made one."""
    return " ".join(text.split())


def count_words(text: str) -> int:
    """Pieces between blanks."""
    return len(text.split())


class Rules:
    """The rules of wording, by the word lists of gve.synth.prompts.

    Args:
        boilerplate: refuse captions that begin with "the video shows" and the like.
        referring: refuse composed queries that hold no word which points at their picture or clip.
    """

    def __init__(self, boilerplate: bool = True, referring: bool = True) -> None:
        lists, self.sha256 = read_lexicon()
        self._boilerplate = tuple(lists["boilerplate"]) if boilerplate else ()
        self._refusal = tuple(lists["refusal"])
        self._names_input = frozenset(lists["names_input"])
        self._referring = frozenset(lists["referring"]) if referring else frozenset()
        self._cues = {kind: frozenset(lists[kind]) for kind in ("spatial", "temporal", "theme")}

    def caption_fault(self, text: str, style: Style) -> str:
        """Reason code of what is wrong with a tidy caption; empty where nothing is."""
        if fault := self._length_fault(text, style):
            return fault
        low = text.casefold()
        if any(phrase in low for phrase in self._refusal):
            return "refusal"
        if style.label == KEYWORDS:
            return "" if "," in text else "no-keywords"
        return "boilerplate" if low.startswith(self._boilerplate) and self._boilerplate else ""

    def query_fault(self, text: str, style: Style) -> str:
        """The same of the text of a composed query."""
        if fault := self._length_fault(text, style):
            return fault
        if any(phrase in text.casefold() for phrase in self._refusal):
            return "refusal"
        words = set(_words(text))
        if self._names_input & words:
            return "names-input"
        return "self-contained" if self._referring and not self._referring & words else ""

    def cues(self, text: str) -> dict[str, float]:
        """Share of spatial, temporal and theme words among the words of all three lists; 0 where there is none.

        A word list cannot tell "left the room" from "left of the room": a statistic over many captions, no test of one.
        """
        words = _words(text)
        counts = {kind: sum(word in own for word in words) for kind, own in self._cues.items()}
        total = sum(counts.values()) or 1
        return {kind: round(count / total, 3) for kind, count in counts.items()}

    @staticmethod
    def _length_fault(text: str, style: Style) -> str:
        words = count_words(text)
        return "few-words" if words < style.fewest else "many-words" if words > style.most else ""


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.casefold())
