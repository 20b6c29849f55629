"""Claims: what captions say is read back whole, true texts are true, and one wrong word is one false kind of claim."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache

import pytest

from gve.toy import captions, families, lessons
from gve.toy.captions import Caption, Teller
from gve.toy.claims import Claim, Reading, Share, claim_shares, judge, parse
from gve.toy.families import Maker
from gve.toy.forms import Fact, Form, Noun, holds
from gve.toy.language import DIALECTS, Dialect
from gve.toy.scenes import CAMERA_MOVES, COLORS, EVENTS, SHAPES, SIZES, TONES, Clip, Scene, Thing

RING = Thing("red", "ring", "large", (0, 0), ("hop right", "", "blink", ""))
BOX = Thing("blue", "square", "small", (2, 1), ("", "swell", "", ""))
SCENE = Scene((RING, BOX), ("grey", "plain"), ("pan left", "still"))
SCENES = 120  # of each dialect
ALL_NOUNS_TOLD = {"short", "paragraph", "general", "main object", "detailed", "static", "story"}
ALL_SIZES_TOLD = {"short", "paragraph", "main object", "detailed", "static", "story"}


@cache
def told() -> list[tuple[str, Dialect, Clip, Caption]]:
    """Captions of every kind: (kind, dialect, clip, caption)."""
    return list(tell())


def tell() -> Iterator[tuple[str, Dialect, Clip, Caption]]:
    for look, dialect in DIALECTS.items():
        make, teller = Maker(f"claims-{look}", look), Teller(dialect, random.Random(look))
        for _ in range(SCENES):
            scene = lessons.random_scene(make)
            for kind in kinds_for(scene):
                yield kind, dialect, (scene,), captions.KINDS[kind](scene, teller)
        for _ in range(5):
            for clip in families.long(make):
                yield "story", dialect, clip, captions.story(clip, teller)


def kinds_for(scene: Scene) -> list[str]:
    pairs = {"paragraph", "spatial", "keywords", "general"} if len(scene.things) < 2 else set()
    orders = set() if captions.timeline(scene) and lessons.one_at_a_time(scene) else {"temporal", "general"}
    return [kind for kind in captions.KINDS if kind not in pairs | orders]


def facts_of(form: Form) -> set[tuple]:
    """(kind, value, colours and shapes of those it is about) of each fact; an order of one event is that event."""
    found = set()
    for fact in form.facts:
        who = tuple((form.nouns[i].color, form.nouns[i].shape) for i in fact.who)
        if fact.kind == "order":
            found |= {("does", event, who[i : i + 1]) for i, event in enumerate(fact.value)}
        if fact.kind != "order" or len(fact.value) > 1:
            found.add((fact.kind, fact.value, who))
    return found


def false_kinds(reading: Reading, clip: Clip) -> set[str]:
    return {
        claim.kind for claim, true in zip(reading.claims, judge(reading.claims, clip), strict=True) if true is False
    }


def test_every_caption_is_read_back_whole_and_true() -> None:
    """The claims of a caption are exactly the facts of its form, for every kind in both dialects; all hold."""
    counts: Counter[str] = Counter()
    for kind, _, clip, caption in told():
        counts[kind] += 1
        reading = parse(caption.text)
        assert not reading.unparsed, caption.text
        assert all(judge(reading.claims, clip)), caption.text
        claims = [claim for claim in reading.claims if claim.kind != "cuts"]
        assert all(holds(claim.form, clip[claim.scene]) for claim in claims), caption.text
        for at, form in enumerate(caption.story):
            here = [claim.form for claim in claims if claim.scene == at]
            assert set().union(*map(facts_of, here)) == facts_of(form), caption.text
            names = {Noun(noun.color, noun.shape) for noun in form.nouns}
            read = {noun for form in here for noun in form.nouns}
            read |= {Noun(noun.color, noun.shape) for noun in read}
            assert {noun for noun in read if not noun.size} <= names
            if kind in ALL_NOUNS_TOLD:
                assert names <= read, caption.text
            if kind in ALL_SIZES_TOLD:
                assert set(form.nouns) <= read, caption.text
    assert set(counts) == {*captions.KINDS, "story"}
    assert min(counts.values()) >= 50


def test_a_text_by_hand() -> None:
    ring, box = Noun("red", "ring"), Noun("blue", "square")
    reading = parse("There is a large red ring at the top left. The red ring hops right and blinks. "
                    "At the start the violet box glides upwards, after that it flashes off and on.")  # fmt: skip
    violet = Noun("purple", "square")
    assert reading.claims == (
        Claim("colour", Form((ring,))),
        Claim("shape", Form((ring,))),
        Claim("size", Form((ring | Noun(size="large"),))),
        Claim("place", Form((ring,), (Fact("at", (0, 0), (0,)),))),
        Claim("move", Form((ring,), (Fact("does", "hop right", (0,)),))),
        Claim("move", Form((ring,), (Fact("does", "blink", (0,)),))),
        Claim("colour", Form((violet,))),
        Claim("shape", Form((violet,))),
        Claim("move", Form((violet,), (Fact("does", "slide up", (0,)),))),
        Claim("move", Form((violet,), (Fact("does", "blink", (0,)),))),
        Claim("order", Form((violet,), (Fact("order", ("slide up", "blink"), (0, 0)),))),
    )
    assert parse("red, camera pans left, grey background, plus sign").claims == (
        Claim("colour", Form((), (Fact("any color", "red"),))),
        Claim("camera", Form((), (Fact("any move", "pan left"),))),
        Claim("ground", Form((), (Fact("tone", "grey"),))),
        Claim("shape", Form((), (Fact("any shape", "cross"),))),
    )
    assert parse("The red ring is left of the blue square.").claims[-1] == Claim(
        "relation", Form((ring, box), (Fact("left of", who=(0, 1)),))
    )


@pytest.mark.parametrize(
    "text",
    [
        "It is at the top left and blinks.",  # nothing that "it" stands for
        "The red ring at blinks.",
        "The red ring blinks the blue square.",
        "The red ring hops sideways.",
        "",
    ],
)
def test_what_cannot_be_read_is_counted(text: str) -> None:
    reading = parse(text)
    assert reading == Reading((), int(bool(text)), (text.removesuffix("."),) if text else ())
    mixed = parse(f"A red ring blinks on a plain grey background. {text}")
    assert (len(mixed.claims), mixed.sentences) == (4, 1 + bool(text)) or text.startswith("It")


# For a dialect and a scene: the pattern of a kind's phrases, and the phrases that would be false in their place.
Swap = Callable[[Dialect, Scene], tuple[str, list[str]]]


def words(book: dict[str, str], plain: tuple[str, ...]) -> list[str]:
    return [book.get(word, word) for word in plain]


def any_of(phrases: list[str], ending: str = r"\b") -> str:
    return rf"\b(?:{'|'.join(sorted(map(re.escape, phrases), key=len, reverse=True))}){ending}"


def absent(words: tuple[str, ...], scene: Scene) -> tuple[str, ...]:
    return tuple(w for w in words if not any(w in (thing.color, thing.shape) for thing in scene.things))


def idle(scene: Scene) -> list[str]:
    return [event for event in EVENTS if not any(event in thing.events for thing in scene.things)]


PLACES = [(x, y) for x in range(3) for y in range(3)]
GROUNDS = [(tone, how) for tone in TONES for how in ("plain", "striped", "checked", "dotted")]
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
SWAPS: dict[str, Swap] = {
    "colour": lambda d, s: (any_of(words(d.colors, COLORS)), words(d.colors, absent(COLORS, s))),
    "shape": lambda d, s: (any_of(words(d.shapes, SHAPES)), words(d.shapes, absent(SHAPES, s))),
    "size": lambda d, s: (any_of(words(d.sizes, SIZES), r"\b(?! later)"), words(d.sizes, SIZES)),
    "move": lambda d, s: (any_of([d.verbs[event] for event in EVENTS]), [d.verbs[event] for event in idle(s)]),
    "place": lambda d, s: (any_of([d.at(place) for place in PLACES]), [d.at(place) for place in PLACES]),
    "ground": lambda d, s: (any_of([d.ground(g) for g in GROUNDS]), [d.ground(g) for g in GROUNDS]),
    "count": lambda d, s: (r"\b(?:one shape|\w+ shapes)\b", ["one shape", "three shapes", "four shapes"]),
    "camera": lambda d, s: (
        any_of([f"camera {d.camera((a, b))}" for a in ("still", *CAMERA_MOVES) for b in ("still", *CAMERA_MOVES)]),
        [f"camera {d.camera((move, 'shake'))}" for move in CAMERA_MOVES],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SWAPS)
def test_one_wrong_word_is_one_false_kind(kind: str) -> None:
    """A phrase of a caption, at one place or throughout, becomes another of its kind: that kind is false, no other."""
    chance = random.Random(kind)
    tried = 0
    for caption_kind, dialect, clip, caption in told():
        if caption_kind in ("keywords", "story", "theme"):
            continue  # keywords name no thing; what a list claims is tested by hand
        pattern, others = SWAPS[kind](dialect, clip[0])
        found = list(re.finditer(pattern, caption.text))
        if not found or not others:
            continue
        spot = chance.choice(found)
        others = [other for other in others if other != spot.group()]
        if not others:
            continue
        other = chance.choice(others)
        tried += 1
        for wrong in (
            caption.text[: spot.start()] + other + caption.text[spot.end() :],
            re.sub(pattern, lambda m: other if m.group() == spot.group() else m.group(), caption.text),  # noqa: B023
        ):
            reading = parse(wrong)
            assert not reading.unparsed, wrong
            assert false_kinds(reading, clip) == {kind}, f"{caption.text} -> {wrong}: {clip[0]}"
    assert tried >= 50


@pytest.mark.parametrize("kind", ["color", "shape"])
def test_a_word_of_another_thing(kind: str) -> None:
    """ "The red square" may mean the red ring or the blue square: one of the two words is false, and nothing else."""
    chance, verdicts = random.Random(kind), Counter()
    for _, dialect, clip, caption in told():
        things = clip[0].things
        book = {"color": dialect.colors, "shape": dialect.shapes}[kind]
        own = book.get(getattr(things[0], kind), getattr(things[0], kind))
        if len(clip) == 1 and len(things) > 1 and caption.story[0].nouns and re.search(rf"\b{own}\b", caption.text):
            other = getattr(chance.choice(things[1:]), kind)
            reading = parse(re.sub(rf"\b{own}\b", book.get(other, other), caption.text))
            verdicts[" ".join(sorted(false_kinds(reading, clip)))] += 1
    right, wrong = ("colour", "shape") if kind == "color" else ("shape", "colour")
    assert set(verdicts) <= {right, wrong}
    assert verdicts[right] > 9 * verdicts[wrong]  # the rest of the text mostly says which is meant


def test_opposite_relations_are_false() -> None:
    tried = 0
    for kind, dialect, clip, caption in told():
        if kind == "story":
            continue  # "at the top left of the picture" is no relation
        book = {words: dialect.relations[OPPOSITE[relation]] for relation, words in dialect.relations.items()}
        wrong, count = re.subn(any_of(list(book)), lambda m: book[m.group()], caption.text)  # noqa: B023
        if count:
            tried += 1
            assert false_kinds(parse(wrong), clip) == {"relation"}, wrong
    assert tried >= 100


def test_another_order_is_false() -> None:
    """The caption of a scene with the same events at other times: only the order is false of the first scene."""
    chance, tried = random.Random(0), 0
    for look, dialect in DIALECTS.items():
        make, teller = Maker(f"order-{look}", look), Teller(dialect, chance)
        for _ in range(SCENES):
            scene = lessons.random_scene(make)
            slots = chance.sample(range(4), 4)
            things = tuple(replace(t, course=tuple(t.course[slot] for slot in slots)) for t in scene.things)
            other = replace(scene, things=things)
            for kind in {"temporal", "general"} & set(kinds_for(other)):
                caption = captions.KINDS[kind](other, teller)
                expected = set() if holds(caption.story[0], scene) else {"order"}
                tried += bool(expected)
                assert false_kinds(parse(caption.text), (scene,)) == expected, caption.text
    assert tried >= 50


@pytest.mark.parametrize(
    ("text", "kinds"),
    [  # judged by hand on SCENE
        ("a red ring blinks", set()),
        ("a blue ring blinks", {"colour"}),  # the ring, since it is the ring that blinks
        ("a blue ring swells", {"shape"}),  # the square, since it is the square that swells
        ("a red square", {"colour"}),  # nothing else is said: a thing is what its shape says
        ("a red ring and a blue ring", {"shape"}),  # the first is the ring, so the second is the square
        ("a pink star blinks", {"colour", "shape", "move"}),  # there is nothing that it could mean
        ("First the red ring blinks, and last it hops right.", {"order"}),
        ("First the red ring hops right, then the blue square swells, and last the red ring hops up.", {"move"}),
        ("First the red ring hops up, and last it blinks.", {"move"}),  # no order is left to be judged
        ("The camera pans left. The scene is on a plain black background.", {"camera", "ground"}),
        ("red, star, blinks, camera zooms in", {"shape", "camera"}),
        ("A busy scene in warm colours on a plain grey background.", {"theme"}),
    ],
)
def test_judged_by_hand(text: str, kinds: set[str]) -> None:
    reading = parse(text)
    assert reading.claims
    assert not reading.unparsed
    assert false_kinds(reading, (SCENE,)) == kinds


def test_scenes_of_a_long_video() -> None:
    """Claims are about the scene they are told of; a scene that is not there makes them false."""
    text = ("The video is made of 3 scenes that follow each other with hard cuts. The second scene of the video is set "
            "on a plain grey background. It shows a large red ring. Nothing else is to be seen there besides the "
            "background.")  # fmt: skip
    other = replace(SCENE, things=(BOX,))
    lone = replace(SCENE, things=(RING,))
    assert false_kinds(parse(text), (other, lone, other)) == set()
    assert false_kinds(parse(text), (other, lone)) == {"cuts"}
    assert false_kinds(parse(text), (lone, SCENE, lone)) == {"count"}
    assert false_kinds(parse(text), (lone,)) == {"cuts", "ground", "colour", "shape", "size", "count"}


def test_shares_by_hand() -> None:
    texts = ["A red ring blinks. It also hops up. What a pity.", "First the blue square blinks, and last it swells."]
    tally = claim_shares(texts, [(SCENE,), (SCENE,)])
    assert tally.shares == {
        "colour": Share(2, 2),
        "shape": Share(2, 2),
        "move": Share(2, 4),  # blinks, swells; not hops up, not the square's blink
        "order": Share(0, 0, unjudged=1),
    }
    assert tally.shares["move"].value == 0.5
    assert (tally.texts, tally.sentences, tally.unparsed) == (2, 4, ("What a pity",))
