"""Claims: what a caption says, read back from its words, so that the checker can say how much of it is true.

The other direction of `captions`: a text of either dialect, written by rule or by a model that errs, becomes claims
that are judged one by one. A wrong word makes one claim false, and that claim's kind says what the teller cannot see.
What cannot be read is counted.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from gve.toy.forms import TESTS, Fact, Form, Noun
from gve.toy.language import DIALECTS
from gve.toy.scenes import COLORS, PATTERNS, SHAPES, SIZES, TONES, Clip, Scene, Thing

KINDS = (
    "colour", "shape", "size", "place", "relation", "count", "ground", "move", "order", "camera", "theme", "cuts",
)  # fmt: skip


@dataclass(frozen=True)
class Claim:
    """One thing that a text says.

    Args:
        kind: one of KINDS; "theme" is pace, density and palette, "cuts" the number of scenes.
        form: the claim with its nouns as they are told: true as a whole if `forms.holds` of it. A "cuts" claim is no
            form of one scene; only `judge` knows it.
        scene: which scene of the clip it is about, from 0.
    """

    kind: str
    form: Form
    scene: int = 0


@dataclass(frozen=True)
class Reading:
    """What was read in a text.

    Args:
        claims: each once, in the order told.
        sentences: how many sentences (keywords, in a list of such) the text has.
        unparsed: those that are no sentence of the toy language.
    """

    claims: tuple[Claim, ...]
    sentences: int
    unparsed: tuple[str, ...]


@dataclass(frozen=True)
class Share:
    """How many claims of a kind were made and are true.

    Args:
        unjudged: claims of an order of which fewer than two events happen: neither true nor false, not part of `made`.
    """

    true: int = 0
    made: int = 0
    unjudged: int = 0

    @property
    def value(self) -> float:
        """True claims / claims made; NaN when none was."""
        return self.true / self.made if self.made else float("nan")


@dataclass(frozen=True)
class Tally:
    """Shares of true claims over many texts.

    Args:
        shares: by kind, in the order of KINDS, kinds that were never claimed left out.
        texts, sentences: how many were read.
        unparsed: sentences that could not be read.
    """

    shares: Mapping[str, Share]
    texts: int
    sentences: int
    unparsed: tuple[str, ...] = field(repr=False)


def claim_shares(texts: Iterable[str], clips: Iterable[Clip]) -> Tally:
    """Judge each text by its own clip.

    Args:
        texts, clips: equally many.
    """
    counts = {kind: [0, 0, 0] for kind in KINDS}
    told = sentences = 0
    unparsed: list[str] = []
    for text, clip in zip(texts, clips, strict=True):
        reading = parse(text)
        told += 1
        sentences += reading.sentences
        unparsed += reading.unparsed
        for claim, true in zip(reading.claims, judge(reading.claims, clip), strict=True):
            counts[claim.kind][0] += true is True
            counts[claim.kind][1] += true is not None
            counts[claim.kind][2] += true is None
    shares = {kind: Share(*count) for kind, count in counts.items() if any(count)}
    return Tally(shares, told, sentences, tuple(unparsed))


# Reading. A sentence becomes a line in which a capital stands for each phrase that carries meaning:
# "There is a red ring at the top left." -> "there is N A". Whether it is a sentence is asked of that line.


def _book(name: str, plain: Iterable[str] = ()) -> dict[str, str]:
    """Wording of either dialect -> the word of scenes and forms."""
    told = {word: word for word in plain}
    for dialect in DIALECTS.values():
        told |= {words: word for word, words in getattr(dialect, name).items()}
    return told


_COLORS, _SHAPES, _SIZES = _book("colors", COLORS), _book("shapes", SHAPES), _book("sizes", SIZES)
_VERBS, _MOVES, _RELATIONS = _book("verbs"), _book("moves"), _book("relations")
_ANY_SHAPE = {dialect.thing: "" for dialect in DIALECTS.values()}
_PLACES = {d.at((x, y)): (x, y) for d in DIALECTS.values() for x in range(3) for y in range(3)}
_GROUNDS = {d.ground((tone, how)): (tone, how) for d in DIALECTS.values() for tone in TONES for how in PATTERNS}
_PALETTES = {d.themes[word]: word for d in DIALECTS.values() for word in ("warm", "cool", "mixed")}
_DENSITIES = {d.themes[word]: word for d in DIALECTS.values() for word in ("sparse", "moderate", "crowded")}
_PACES = {d.themes[word]: word for d in DIALECTS.values() for word in ("calm", "busy")}
_NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5}
_ORDINALS = {"first": 0, "second": 1, "third": 2, "fourth": 3, "fifth": 4, "sixth": 5}
_LINKS = (
    "first", "then", "and last", "to begin with", "next", "and in the end",
    "at the start", "after that", "and at the end", "in the beginning", "a little later", "and finally",
)  # fmt: skip


def _any(phrases: Iterable[str]) -> str:
    return "|".join(sorted(map(re.escape, phrases), key=len, reverse=True))


_MOOD = _any({**_DENSITIES, **_PACES})
_PHRASES = {  # tag -> how it is worded; at one place of a sentence the first that fits is taken
    "S": rf"the (?P<opened>{_any(_ORDINALS)}) scene of the video",
    "O": rf"the (?P<during>{_any(_ORDINALS)}) scene",
    "C": rf"the camera (?P<move>{_any(_MOVES)})(?: and then (?P<next_move>{_any(_MOVES)}))?",
    "T": rf"an? (?P<mood>{_MOOD})(?:, (?P<next_mood>{_MOOD}))? scene in (?P<palette>{_any(_PALETTES)})",
    "G": f"(?P<ground>{_any(_GROUNDS)})",
    "A": f"(?P<place>{_any(_PLACES)})",
    "L": _any(_LINKS),
    "N": rf"(?:an?|the) (?:(?P<size>{_any(_SIZES)}) )?(?:(?P<color>{_any(_COLORS)}) )?"
    rf"(?P<shape>{_any({**_SHAPES, **_ANY_SHAPE})})",
    "E": f"(?P<verb>{_any(_VERBS)})",
    "R": f"(?P<relation>{_any(_RELATIONS)})",
    "K": rf"(?P<count>{_any(_NUMBERS)}) shapes?",
    "M": r"(?P<scenes>\d+) scenes",
}
_PHRASE = re.compile(rf"\b(?:{'|'.join(f'(?P<{tag}>{words})' for tag, words in _PHRASES.items())})\b")
_DOES = "E(?:(?:, E)* and E)?"
_SENTENCES = (
    rf"(?:in this clip )?N(?: G)? {_DOES}",
    rf"N {_DOES}(?: G)?",
    rf"G N {_DOES}",
    rf"N A {_DOES}",
    rf"(?:there is N that|the video shows N which) {_DOES}(?: G)?",
    rf"we see N(?: G)? and it {_DOES}",
    rf"it (?:also )?{_DOES}(?: A)?",
    rf"it is A and {_DOES}",
    r"(?:all this is|everything happens|they stand|the scene is) G",
    r"(?:N is|there is N|one sees N) R N",
    r"N (?:is A|can be found A of the picture)",
    r"there is N A",
    r"(?:the main object is|the object that stands out is|what one notices is|it shows) N",
    r"the scene is set G and holds K",
    r"C(?:, and all is G)?",
    r"(?:in this shot|what is filmed is) G,(?: and)? C",
    r"(?:the theme is |this is |taken as a whole it is )?T G",
    r"(?:the mood is that of|all in all one sees|the whole makes) T G",
    r"(?:a picture of |the image shows )?N(?: A)?(?:(?:, N(?: A)?)* and N(?: A)?)?(?: G)?",
    r"L (?:N|it) E(?:, L (?:N|it) E)*",
    r"the video is made of M that follow each other with hard cuts",
    r"S is set G",
    rf"all through O N {_DOES}",
    r"nothing else is to be seen there besides the background",
)
_SENTENCE = re.compile("|".join(f"(?:{sentence})" for sentence in _SENTENCES))
_BACKWARD = re.compile(r"\bit (?:also )?(?:E|is A)")  # "it", which needs something to stand for
_KEYWORDS = {
    **{word: ("colour", Fact("any color", color)) for word, color in _COLORS.items()},
    **{word: ("shape", Fact("any shape", shape)) for word, shape in _SHAPES.items()},
    **{word: ("move", Fact("any event", event)) for word, event in _VERBS.items() if event},
    **{f"camera {word}": ("camera", Fact("any move", move)) for word, move in _MOVES.items()},
    **{f"{tone} background": ("ground", Fact("tone", tone)) for tone in TONES},
    **{pattern: ("ground", Fact("pattern", pattern)) for pattern in PATTERNS},
}


def parse(text: str) -> Reading:
    """Read a caption of any kind, of either dialect or of both mixed."""
    reader = _Reader()
    for sentence in re.split(r"\.(?:\s+|$)", text.strip()):
        if sentence.strip():
            reader.read(sentence.strip())
    return Reading(tuple(reader.claims), reader.sentences, tuple(reader.unparsed))


class _Reader:
    """Reads sentence by sentence and remembers what "it" stands for and which scene is told."""

    def __init__(self) -> None:
        self.claims: dict[Claim, None] = {}
        self.sentences = 0
        self.unparsed: list[str] = []
        self._scene = 0
        self._subject: Noun | None = None
        self._named: set[Noun] = set()

    def read(self, sentence: str) -> None:
        phrases: list[re.Match[str]] = []

        def tag(phrase: re.Match[str]) -> str:
            phrases.append(phrase)
            return str(phrase.lastgroup)  # the outermost group: the tag

        line = _PHRASE.sub(tag, sentence.lower())
        backward = _BACKWARD.search(line)
        dangling = backward is not None and self._subject is None and "N" not in line[: backward.start()]
        if _SENTENCE.fullmatch(line) and not dangling:
            self.sentences += 1
            self._understand(line, phrases)
        else:
            self._keywords(sentence)

    def _keywords(self, sentence: str) -> None:
        """A list of keywords, each a sentence of its own; or one sentence that cannot be read."""
        words = sentence.split(", ")
        if not any(word.lower() in _KEYWORDS for word in words):
            words = [sentence]
        self.sentences += len(words)
        for word in words:
            if word.lower() in _KEYWORDS:
                self._claim(*_KEYWORDS[word.lower()])
            else:
                self.unparsed.append(word)

    def _claim(self, kind: str, *facts: Fact, nouns: tuple[Noun, ...] = ()) -> None:
        self.claims[Claim(kind, Form(nouns, facts), self._scene)] = None

    def _understand(self, line: str, phrases: Sequence[re.Match[str]]) -> None:
        steps: list[tuple[Noun, str]] = []
        relation = ""
        for phrase in phrases:
            tag, words = str(phrase.lastgroup), phrase.groupdict()
            subject = self._subject or Noun()
            if tag == "N":
                noun = self._name(words)
                if relation:
                    self._claim("relation", Fact(relation, who=(0, 1)), nouns=(subject, noun))
                else:
                    self._subject = noun
            elif tag == "R":
                relation = _RELATIONS[words["relation"]]
            elif tag == "A":
                self._claim("place", Fact("at", _PLACES[words["place"]], (0,)), nouns=(subject,))
            elif tag == "E":
                event = _VERBS[words["verb"]]
                fact = Fact("does", event, (0,)) if event else Fact("rests", who=(0,))
                self._claim("move", fact, nouns=(subject,))
                steps.append((subject, event))
            else:
                self._set(tag, words)
        if "L" in line and len(steps) > 1:
            nouns = tuple(dict.fromkeys(noun for noun, _ in steps))
            who = tuple(nouns.index(noun) for noun, _ in steps)
            self._claim("order", Fact("order", tuple(event for _, event in steps), who), nouns=nouns)
        if "nothing else" in line:
            self._claim("count", Fact("count", len(self._named)))

    def _name(self, words: Mapping[str, str]) -> Noun:
        """A thing that is named: what its name claims, and the noun under which it is known."""
        color, shape = _COLORS.get(words["color"], ""), _SHAPES.get(words["shape"], "")
        noun = Noun(color, shape)
        if color:
            self._claim("colour", nouns=(noun,))
        if shape:
            self._claim("shape", nouns=(noun,))
        if words["size"]:
            self._claim("size", nouns=(Noun(color, shape, _SIZES[words["size"]]),))
        self._named.add(noun)
        return noun

    def _set(self, tag: str, words: Mapping[str, str]) -> None:
        """What is said of a scene as a whole."""
        if tag == "G":
            self._claim("ground", Fact("ground", _GROUNDS[words["ground"]]))
        elif tag == "C":
            first = words["move"]
            self._claim("camera", Fact("camera", (_MOVES[first], _MOVES[words["next_move"] or first])))
        elif tag == "K":
            self._claim("count", Fact("count", _NUMBERS[words["count"]]))
        elif tag == "T":
            for mood in (words["mood"], words["next_mood"]):
                for kind, book in (("pace", _PACES), ("density", _DENSITIES)):
                    if mood in book:
                        self._claim("theme", Fact(kind, book[mood]))
            self._claim("theme", Fact("palette", _PALETTES[words["palette"]]))
        elif tag == "M":
            self._claim("cuts", Fact("scenes", int(words["scenes"])))
        elif tag == "S":
            self._scene, self._subject = _ORDINALS[words["opened"]], None
            self._named.clear()
        elif tag == "O":
            self._scene = _ORDINALS[words["during"]]


# Judging.

Referents = dict[Noun, Thing | None]


def judge(claims: Sequence[Claim], clip: Clip) -> list[bool | None]:
    """Whether each claim of one text is true of the clip.

    First it is settled which thing each noun means: the one that it describes; else, of those that share its colour or
    its shape, the one that makes most of the text true. A claim is then judged of that thing, so that a wrong colour
    makes a claim of colour false and leaves the claims of place and move as they are. A noun that shares neither with
    anything means nothing, and all claims about it are false. An order is judged of those of its events that happen;
    with fewer than two of them it is not judged (None), since the claims of move say already what is wrong.

    Args:
        claims: of one text.
        clip: its scenes in order; a claim about a scene that it lacks is false.
    """
    by_scene: dict[int, list[Claim]] = defaultdict(list)
    for claim in claims:
        by_scene[claim.scene].append(claim)
    meant = {at: _referents(told, clip[at]) for at, told in by_scene.items() if at < len(clip)}
    verdicts: list[bool | None] = []
    for claim in claims:
        if claim.kind == "cuts":
            verdicts.append(claim.form.facts[0].value == len(clip))
        elif claim.scene in meant:
            verdicts.append(_is_true(claim, clip[claim.scene], meant[claim.scene]))
        else:
            verdicts.append(False)
    return verdicts


def _referents(claims: Sequence[Claim], scene: Scene) -> Referents:
    """The thing that each noun means: best for each while the others stand, until nothing changes."""
    about: dict[Noun, list[Claim]] = defaultdict(list)
    for claim in claims:
        for noun in dict.fromkeys(map(_named, claim.form.nouns)):
            about[noun].append(claim)
    meant: Referents = dict.fromkeys(about)
    for _ in range(len(about) + 1):
        before = dict(meant)
        for noun, told in about.items():
            meant[noun] = _best(noun, told, scene, meant)
        if meant == before:
            break
    return meant


def _best(noun: Noun, told: Sequence[Claim], scene: Scene, meant: Referents) -> Thing | None:
    """The thing that makes most claims about the noun true; then one that no other noun means; then by shape."""
    taken = [thing for other, thing in meant.items() if other != noun]

    def worth(thing: Thing) -> tuple[int, bool, bool]:
        true = sum(_is_true(claim, scene, {**meant, noun: thing}) is True for claim in told)
        return true, thing not in taken, thing.shape == noun.shape

    return max(_candidates(noun, scene), key=worth, default=None)


def _candidates(noun: Noun, scene: Scene) -> list[Thing]:
    described = [thing for thing in scene.things if noun.fits(thing)]
    return described or [thing for thing in scene.things if thing.color == noun.color or thing.shape == noun.shape]


def _is_true(claim: Claim, scene: Scene, meant: Referents) -> bool | None:
    """Whether the claim is true of the things its nouns mean; None for an order that cannot be judged."""
    things = [thing for noun in claim.form.nouns if (thing := meant[_named(noun)])]
    if len(things) < len(claim.form.nouns):
        return False
    if not claim.form.facts:
        noun, thing = claim.form.nouns[0], things[0]
        told, seen = {
            "colour": (noun.color, thing.color),
            "shape": (noun.shape, thing.shape),
            "size": (noun.size, thing.size),
        }[claim.kind]
        return told == seen
    (fact,) = claim.form.facts
    who = [things[i] for i in fact.who]
    if claim.kind != "order":
        return TESTS[fact.kind](scene, who, fact.value)
    happening = [(thing, event) for thing, event in zip(who, fact.value, strict=True) if event in thing.events]
    if len(happening) < 2:
        return None
    return TESTS["order"](scene, [thing for thing, _ in happening], [event for _, event in happening])


def _named(noun: Noun) -> Noun:
    """The noun without its size: "the red ring" is the large one that was brought in before."""
    return Noun(noun.color, noun.shape)
