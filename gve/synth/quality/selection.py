"""Which weak pairs go on: rules over what `scan` measured, of each row and of the whole run.

A row is dropped by the first rule that turns it away, in the order of gve.synth.quality.reasons.RULES: the caption,
the pictures, and then what needs the other rows. Each of those looks at the rows that the rules before it left:

- caption-repeated counts the different videos of a caption;
- inconsistent takes its quantile over them;
- duplicate and near-duplicate keep the first row of the run's order, and drop every later one that equals, or looks
  like, a row that is kept. A copy of a dropped row is therefore kept.

Memory: some 800 bytes a row, 0.8 GB for a million.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from gve.items import InputError
from gve.synth.quality.hashes import ClipHash, bits, near_pairs, text_key
from gve.synth.quality.reasons import RULES, STAGE
from gve.synth.units import Context, Outcome, Row, Scope


@dataclass(frozen=True)
class SelectOptions:
    """Which rules are asked, and where each draws its line.

    Args:
        rules: codes of gve.synth.quality.reasons.RULES; those that are left out turn nothing away. Their order here
            means nothing.
        min_selling: weight of selling phrases from which a caption is an advertisement; one strong phrase has 1.
        min_telling: words that say something of what is shown; under it a caption is not descriptive.
        min_foreign: certainty from which another language is believed.
        min_words: of a caption.
        max_black: share of black frames from which a video is black.
        max_static: share of the time that one still picture may last before the video is static.
        max_slides, min_slide_change: share of the time that slides may fill, and the share of the picture that must
            change between them for a slide show.
        max_frozen: share of the time that its last picture may stand still.
        max_repeats: videos that may share a caption.
        min_similarity: cosine under which caption and video are inconsistent; null takes the quantile.
        drop_share: the quantile: this share of the rows, those of least similarity, is dropped. 0 drops none.
        max_bits: differing bits a frame, of 64, up to which two videos look alike.
        max_colour: difference of a mean level in any of 4 x 4 cells up to which they do, of 255.
        several_captions: keep rows of one video whose captions differ; else a video stays once.
    """

    rules: tuple[str, ...] = RULES
    min_selling: float = 1.0
    min_telling: int = 1
    min_foreign: float = 0.9
    min_words: int = 3
    max_black: float = 0.5
    max_static: float = 0.95
    max_slides: float = 0.8
    min_slide_change: float = 0.25
    max_frozen: float = 0.5
    max_repeats: int = 3
    min_similarity: float | None = None
    drop_share: float = 0.05
    max_bits: float = 4.0
    max_colour: float = 10.0
    several_captions: bool = False

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.rules) - set(RULES)):
            raise InputError(f"select: no rule {unknown[0]!r}: use {', '.join(RULES)}")
        shares = ("min_foreign", "max_black", "max_static", "max_slides", "min_slide_change")
        for name in (*shares, "max_frozen", "drop_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"select: {name} {getattr(self, name)}: use a share from 0 to 1")
        if self.min_words < 1 or self.max_repeats < 1 or not 0 <= self.max_bits <= 16 or self.max_colour < 0:
            raise InputError(
                f"select: min_words {self.min_words}, max_repeats {self.max_repeats}, max_bits {self.max_bits}, "
                f"max_colour {self.max_colour}: use at least 1, at least 1, 0 to 16 of 64 bits, at least 0"
            )


EMPTY_CAPTION = np.uint64(int(text_key(""), 16))

Verdict = tuple[float | None, str]
"""Score and detail of a rule that turns a row away."""


def judge(row: Row, options: SelectOptions) -> tuple[str, float | None, str]:
    """The first rule on the row alone that turns it away, with score and detail; the rule is empty when none does."""
    for rule, judged in ROW_RULES.items():
        if rule in options.rules and (verdict := judged(row, options)) is not None:
            return rule, *verdict
    return "", None, ""


def _caption(
    measure: str, wrong: Callable[[Any, SelectOptions], bool]
) -> Callable[[Row, SelectOptions], Verdict | None]:
    """A rule on a measure of the caption; an empty caption is the matter of caption-missing alone."""

    def rule(row: Row, options: SelectOptions) -> Verdict | None:
        value = row["quality"]["text"][measure]
        return (float(value), row["caption"]) if row["caption"].strip() and wrong(value, options) else None

    return rule


def _pictures(
    measure: str, wrong: Callable[[Any, SelectOptions], bool]
) -> Callable[[Row, SelectOptions], Verdict | None]:
    """A rule on a measure of the dynamics."""

    def rule(row: Row, options: SelectOptions) -> Verdict | None:
        dynamics = row["quality"]["dynamics"]
        if not wrong(dynamics, options):
            return None
        return dynamics[measure], ", ".join(f"{name} {value:g}" for name, value in dynamics.items())

    return rule


ROW_RULES: Mapping[str, Callable[[Row, SelectOptions], Verdict | None]] = {
    "caption-missing": lambda row, options: None if row["caption"].strip() else (None, ""),
    "caption-url": _caption("urls", lambda count, options: count > 0),
    "caption-file-name": _caption("files", lambda count, options: count > 0),
    "caption-advertisement": _caption("selling", lambda weight, options: weight >= options.min_selling),
    "caption-non-descriptive": _caption("telling", lambda count, options: count < options.min_telling),
    "caption-language": _caption("foreign", lambda sure, options: sure > 0 and sure >= options.min_foreign),
    "caption-too-short": _caption("words", lambda count, options: count < options.min_words),
    "black-video": _pictures("black_share", lambda seen, options: seen["black_share"] > options.max_black),
    "static-video": _pictures("held_longest", lambda seen, options: seen["held_longest"] > options.max_static),
    "slide-show": _pictures(
        "slide_share",
        lambda seen, options: (
            seen["slide_share"] > options.max_slides and seen["slide_change"] >= options.min_slide_change
        ),
    ),
    "frozen-video": _pictures("held_end", lambda seen, options: seen["held_end"] > options.max_frozen),
}
"""Rules on a row alone, in order."""


@dataclass
class _Columns:
    """What the rules on the run need of every row: numbers only."""

    reason: array[int] = field(default_factory=lambda: array("b"))
    caption: array[int] = field(default_factory=lambda: array("Q"))
    video: array[int] = field(default_factory=lambda: array("Q"))
    similarity: array[float] = field(default_factory=lambda: array("d"))
    frames: array[int] = field(default_factory=lambda: array("Q"))
    colours: bytearray = field(default_factory=bytearray)

    def add(self, row: Row, reason: str) -> None:
        quality = row["quality"]
        self.reason.append(RULES.index(reason) if reason else -1)
        self.caption.append(int(quality["text"]["key"], 16))
        self.video.append(int(quality["sha256"][:16], 16))
        self.similarity.append(np.nan if quality["similarity"] is None else quality["similarity"])
        clip = ClipHash.from_text(quality["hash"])
        self.frames.frombytes(clip.frames.tobytes())
        self.colours += clip.colours.tobytes()


class Select:
    """The step."""

    Options: ClassVar[type] = SelectOptions
    scope: ClassVar[Scope] = "run"

    def __init__(self, options: SelectOptions, context: Context) -> None:
        self._options = options

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        return {}

    def run(self, rows: Iterable[Row]) -> Iterator[Outcome]:
        """Raises InputError when a similarity is asked for and none was measured."""
        columns = _Columns()
        for row in rows:
            columns.add(row, judge(row, self._options)[0])
        found = _Found(columns, self._options)
        ids: dict[int, str] = {}  # of the rows that others are compared with; they come first
        for place, row in enumerate(rows):
            rule, score, detail = judge(row, self._options)
            if not rule:
                rule, score, detail = found.verdict(place, row, ids)
            if place in found.leaders:
                ids[place] = row["id"]
            yield Outcome.drop(row, STAGE, rule, score=score, detail=detail) if rule else Outcome(row["id"], (row,))


class _Found:
    """What the rules on the run have found: the verdict on every row that those on a row have left."""

    def __init__(self, columns: _Columns, options: SelectOptions) -> None:
        self._options = options
        count = len(columns.reason)
        self._reason = np.array(columns.reason, np.int8)
        self._captions = np.array(columns.caption, np.uint64)
        self._videos = np.array(columns.video, np.uint64)
        self._similarity = np.array(columns.similarity, np.float64)
        self._frames = np.array(columns.frames, np.uint64).reshape(count, len(columns.frames) // max(count, 1))
        self._colours = np.frombuffer(columns.colours, np.uint8).reshape(count, len(columns.colours) // max(count, 1))
        self._score = np.full(count, np.nan)
        self._kept = np.full(count, -1, np.int64)  # the row that a duplicate repeats
        self.threshold = np.nan
        for rule, find in (
            ("caption-repeated", self._repeated),
            ("inconsistent", self._inconsistent),
            ("duplicate", self._duplicates),
            ("near-duplicate", self._near),
        ):
            if rule in options.rules:
                find()
        self.leaders = frozenset(self._kept[self._kept >= 0].tolist())

    def verdict(self, place: int, row: Row, ids: Mapping[int, str]) -> tuple[str, float | None, str]:
        """Rule, score and detail; the rule is empty when the row goes on."""
        code = int(self._reason[place])
        if code < 0:
            return "", None, ""
        rule = RULES[code]
        score = None if np.isnan(self._score[place]) else float(self._score[place])
        if rule == "inconsistent":
            return rule, score, f"under {self.threshold:g}: {row['caption']}"
        return rule, score, ids[int(self._kept[place])] if self._kept[place] >= 0 else row["caption"]

    @property
    def _left(self) -> np.ndarray:
        """Places of the rows that no rule has turned away so far."""
        return np.flatnonzero(self._reason < 0)

    def _turn_away(self, places: np.ndarray, rule: str, scores: Any = np.nan, kept: Any = -1) -> None:
        self._reason[places], self._score[places], self._kept[places] = RULES.index(rule), scores, kept

    def _repeated(self) -> None:
        """Captions of more than max_repeats videos; the empty one repeats nothing."""
        left = self._left
        pairs = np.unique(np.stack([self._captions[left], self._videos[left]], 1), axis=0)
        captions, counts = np.unique(pairs[:, 0], return_counts=True)
        many = counts[np.searchsorted(captions, self._captions[left])] if len(left) else counts
        wrong = (many > self._options.max_repeats) & (self._captions[left] != EMPTY_CAPTION)
        self._turn_away(left[wrong], "caption-repeated", many[wrong])

    def _inconsistent(self) -> None:
        left = self._left
        left = left[~np.isnan(self._similarity[left])]
        values = self._similarity[left]
        if self._options.min_similarity is not None:
            if len(self._similarity) and np.isnan(self._similarity).all():
                raise InputError("select: min_similarity is given, but nothing was measured: set `scan.similarity`")
            self.threshold = self._options.min_similarity
        else:
            dropped = int(self._options.drop_share * len(values))
            self.threshold = float(np.sort(values)[dropped]) if dropped < len(values) else np.inf
            if not dropped:
                return
        wrong = values < self.threshold
        self._turn_away(left[wrong], "inconsistent", values[wrong])

    def _duplicates(self) -> None:
        left = self._left
        columns = [self._videos[left]] + ([self._captions[left]] if self._options.several_captions else [])
        _, first, group = np.unique(np.stack(columns, 1), axis=0, return_index=True, return_inverse=True)
        leader = first[group.reshape(-1)]
        later = leader != np.arange(len(left))
        self._turn_away(left[later], "duplicate", kept=left[leader[later]])

    def _near(self) -> None:
        left = self._left
        dropped: set[int] = set()
        frames, colours = self._frames[left], self._colours[left]
        pairs = left[near_pairs(frames, colours, self._options.max_bits, self._options.max_colour)]
        if self._options.several_captions:
            pairs = pairs[self._captions[pairs[:, 0]] == self._captions[pairs[:, 1]]]
        # By the later row, then by the earlier one: whether the earlier is kept is known when it is asked.
        for first, later in pairs[np.lexsort(pairs.T)].tolist():
            if first in dropped or later in dropped:
                continue
            dropped.add(later)
            distance = float(bits(self._frames[first], self._frames[later]))
            self._turn_away(np.array([later]), "near-duplicate", distance, first)
