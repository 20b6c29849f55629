"""Captions of every kind, each with the logical form it claims.

A caption function looks at a scene, decides what to tell, and returns the text together with the form of exactly
what the text says; `holds(form, scene)` is true for its own scene by construction, and a test proves it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

from gve.toy.forms import Fact, Form, Noun, Story, density, pace, palette
from gve.toy.language import Dialect, join, sentence
from gve.toy.scenes import SLOTS, Clip, Scene, Thing

Choice = TypeVar("Choice")


@dataclass(frozen=True)
class Caption:
    """A text and what it claims of each scene of a clip, in order."""

    text: str
    story: Story


@dataclass(frozen=True)
class Teller:
    """Who tells: a dialect, and the chance that chooses among wordings."""

    dialect: Dialect
    random: random.Random

    def one(self, choices: Sequence[Choice]) -> Choice:
        return self.random.choice(list(choices))

    def coin(self, probability: float = 0.5) -> bool:
        return self.random.random() < probability

    @property
    def terse(self) -> bool:
        """Whether this is dialect A, which puts things shortly; B opens its sentences with a phrase."""
        return self.dialect.name == "A"


def _noun(thing: Thing, sized: bool = False) -> Noun:
    return Noun(thing.color, thing.shape, thing.size if sized else "")


def _event_facts(thing: Thing, who: int) -> tuple[Fact, ...]:
    if not thing.events:
        return (Fact("rests", who=(who,)),)
    return tuple(Fact("does", event, (who,)) for event in dict.fromkeys(thing.events))


def relation(one: Thing, other: Thing) -> str:
    """How the first stands to the second, along the axis on which they are further apart."""
    dx, dy = other.place[0] - one.place[0], other.place[1] - one.place[1]
    if abs(dx) >= abs(dy):
        return "left of" if dx > 0 else "right of"
    return "above" if dy > 0 else "below"


def timeline(scene: Scene) -> list[tuple[int, str]]:
    """(thing, event) of the slot events in order of time."""
    return [(i, t.course[slot]) for slot in range(len(SLOTS)) for i, t in enumerate(scene.things) if t.course[slot]]


def short(scene: Scene, teller: Teller) -> Caption:
    """One short sentence about the main event, as in MSRVTT."""
    d, main = teller.dialect, scene.things[0]
    tell_ground = teller.coin()
    noun = _noun(main, sized=teller.coin(0.3))
    phrase, verb = d.noun(noun), d.does(tuple(dict.fromkeys(main.events)) or ("",))
    ground = f" {d.ground(scene.ground)}" if tell_ground else ""
    openings = ["{n} {v}{g}", "there is {n} that {v}{g}", "we see {n}{g} and it {v}"]
    if not teller.terse:
        openings = ["in this clip {n}{g} {v}", "the video shows {n} which {v}{g}", "{g2}{n} {v}"]
    text = teller.one(openings).format(n=phrase, v=verb, g=ground, g2=f"{ground[1:]} " if ground else "")
    facts = _event_facts(main, 0) + ((Fact("ground", scene.ground),) if tell_ground else ())
    return Caption(text, (Form((noun,), facts),))


def event(scene: Scene, who: int, what: str, teller: Teller) -> Caption:
    """One event of one thing as a clause, as in DREAM-1K."""
    d, thing = teller.dialect, scene.things[who]
    noun = _noun(thing, sized=True)
    text = f"{d.noun(noun)} {d.at(thing.place)} {d.verbs[what]}"
    return Caption(text, (Form((noun,), (Fact("at", thing.place, (0,)), Fact("does", what, (0,)))),))


def paragraph(scene: Scene, teller: Teller) -> Caption:
    """Three to five sentences joined, one per event, as in DiDeMo."""
    d = teller.dialect
    nouns = tuple(_noun(thing) for thing in scene.things)
    facts: list[Fact] = []
    sentences: list[str] = []
    for who, thing in enumerate(scene.things):
        for fact in _event_facts(thing, who):
            again = bool(facts) and facts[-1].who == (who,)
            subject = "it also" if again else d.noun(nouns[who])
            sentences.append(sentence(f"{subject} {d.verbs[fact.value or '']}"))
            facts.append(fact)
    if teller.coin():
        facts.append(Fact("ground", scene.ground))
        opening = "all this is" if teller.terse else "everything happens"
        sentences.append(sentence(f"{opening} {d.ground(scene.ground)}"))
    if teller.coin():
        one, other = scene.things[:2]
        facts.append(Fact(relation(one, other), who=(0, 1)))
        sentences.append(_relation_sentence(scene, 0, 1, teller))
    return Caption(" ".join(sentences), (Form(nouns, tuple(facts)),))


def _relation_sentence(scene: Scene, one: int, other: int, teller: Teller) -> str:
    d = teller.dialect
    first, second = scene.things[one], scene.things[other]
    stands = d.relations[relation(first, second)]
    return sentence(f"{d.noun(_noun(first), 'the')} is {stands} {d.noun(_noun(second), 'the')}")


def _arrangement(things: Sequence[Thing], nouns: Sequence[Noun], teller: Teller) -> tuple[str, Fact]:
    """The first two things, brought in by how they stand to each other."""
    d = teller.dialect
    fact = Fact(relation(things[0], things[1]), who=(0, 1))
    openings = ["{a} is {r} {b}", "there is {a} {r} {b}"] if teller.terse else ["one sees {a} {r} {b}"]
    text = teller.one(openings).format(a=d.noun(nouns[0]), r=d.relations[fact.kind], b=d.noun(nouns[1]))
    return sentence(text), fact


def spatial(scene: Scene, teller: Teller) -> Caption:
    """Where the things are, and nothing of what they do, as in CaReBench's spatial captions."""
    d = teller.dialect
    order = list(range(len(scene.things)))
    teller.random.shuffle(order)
    things = [scene.things[i] for i in order]
    nouns = tuple(_noun(thing, sized=teller.coin(0.3)) for thing in things)
    opening, fact = _arrangement(things, nouns, teller)
    sentences, facts = [opening], [fact]
    for who in teller.random.sample(range(len(things)), teller.random.randint(0, len(things))):
        facts.append(Fact("at", things[who].place, (who,)))
        sentences.append(sentence(f"{d.noun(_noun(things[who]), 'the')} is {d.at(things[who].place)}"))
    if teller.coin():
        facts.append(Fact("ground", scene.ground))
        sentences.append(sentence(f"they stand {d.ground(scene.ground)}"))
    return Caption(" ".join(sentences), (Form(nouns, tuple(facts)),))


def _order_clause(scene: Scene, nouns: Sequence[Noun], teller: Teller, article: str) -> tuple[str, Fact]:
    """The slot events in their order, as one sentence, and the fact it states."""
    d, steps = teller.dialect, timeline(scene)
    links = teller.random.choice(
        [("first", "then", "and last"), ("to begin with", "next", "and in the end")]
        if teller.terse
        else [("at the start", "after that", "and at the end"), ("in the beginning", "a little later", "and finally")]
    )
    clauses: list[str] = []
    told: list[int] = []
    for i, (who, what) in enumerate(steps):
        link = links[0] if i == 0 else links[2] if i == len(steps) - 1 else links[1]
        same = bool(told) and told[-1] == who
        subject = "it" if same else d.noun(nouns[who], "the" if who in told else article)
        clauses.append(f"{link} {subject} {d.verbs[what]}")
        told.append(who)
    fact = Fact("order", tuple(what for _, what in steps), tuple(who for who, _ in steps))
    return sentence(", ".join(clauses)), fact


def temporal(scene: Scene, teller: Teller) -> Caption:
    """What happens in which order, as in CaReBench's temporal captions."""
    nouns = tuple(_noun(thing) for thing in scene.things)
    text, fact = _order_clause(scene, nouns, teller, "a")
    return Caption(text, (Form(nouns, (fact,)),))


def general(scene: Scene, teller: Teller) -> Caption:
    """Where and when together, as in CaReBench's full captions."""
    d = teller.dialect
    nouns = tuple(_noun(thing, sized=teller.coin(0.3)) for thing in scene.things)
    opening, arranged = _arrangement(scene.things, nouns, teller)
    named = tuple(_noun(thing) for thing in scene.things)
    ending, ordered = _order_clause(scene, named, teller, "the")
    places = [sentence(f"{d.noun(n, 'the')} is {d.at(t.place)}") for n, t in zip(named, scene.things, strict=True)]
    ground = sentence(f"they stand {d.ground(scene.ground)}")
    at = (Fact("at", thing.place, (i,)) for i, thing in enumerate(scene.things))
    facts = (arranged, *at, Fact("ground", scene.ground), ordered)
    return Caption(" ".join([opening, *places, ground, ending]), (Form(nouns, facts),))


def main_object(scene: Scene, teller: Teller) -> Caption:
    """The one large object in two sentences, as in VDC's main object captions."""
    d, main = teller.dialect, scene.things[0]
    noun = _noun(main, sized=True)
    openings = ["the main object is {}", "the object that stands out is {}"]
    text = sentence(teller.one(openings if teller.terse else ["what one notices is {}"]).format(d.noun(noun)))
    verb = d.does(tuple(dict.fromkeys(main.events)) or ("",))
    text += " " + sentence(teller.one(["it is {0} and {1}", "it {1} {0}"]).format(d.at(main.place), verb))
    facts = (Fact("at", main.place, (0,)), *_event_facts(main, 0))
    return Caption(text, (Form((noun,), facts),))


def detailed(scene: Scene, teller: Teller) -> Caption:
    """Everything, the main object last, as in VDC's detailed captions."""
    d = teller.dialect
    order = [*range(1, len(scene.things)), 0]  # the fact that differs inside a foil group comes late
    nouns = tuple(_noun(thing, sized=True) for thing in scene.things)
    count = {1: "one shape", 2: "two shapes", 3: "three shapes", 4: "four shapes", 5: "five shapes"}[len(order)]
    opening = f"the scene is set {d.ground(scene.ground)} and holds {count}"
    sentences = [sentence(opening), sentence(f"the camera {d.camera(scene.camera)}")]
    facts = [Fact("ground", scene.ground), Fact("count", len(order)), Fact("camera", scene.camera)]
    for who in order:
        thing = scene.things[who]
        sentences.append(sentence(f"there is {d.noun(nouns[who])} {d.at(thing.place)}"))
        verb = d.does(tuple(dict.fromkeys(thing.events)) or ("",))
        sentences.append(sentence(f"{d.noun(_noun(thing), 'the')} {verb}"))
        facts += [Fact("at", thing.place, (who,)), *_event_facts(thing, who)]
    for one, other in pairwise(order):
        facts.append(Fact(relation(scene.things[one], scene.things[other]), who=(one, other)))
        sentences.append(_relation_sentence(scene, one, other, teller))
    return Caption(" ".join(sentences), (Form(nouns, tuple(facts)),))


def camera(scene: Scene, teller: Teller) -> Caption:
    """What the camera does, and over what, as in CameraBench."""
    d = teller.dialect
    verb, ground = d.camera(scene.camera), d.ground(scene.ground)
    openings = ["The camera {v}. The scene is {g}.", "In this shot {g}, the camera {v}."]
    if not teller.terse:
        openings = ["What is filmed is {g}, and the camera {v}.", "The camera {v}, and all is {g}."]
    text = teller.one(openings).format(v=verb, g=ground)
    return Caption(text, (Form((), (Fact("camera", scene.camera), Fact("ground", scene.ground))),))


def theme(scene: Scene, teller: Teller) -> Caption:
    """Pace, density, palette and ground, and no object, as in LoVR's themes."""
    words = teller.dialect.themes
    facts = [Fact("density", density(scene)), Fact("palette", palette(scene)), Fact("ground", scene.ground)]
    adjectives = [words[density(scene)]]
    if pace(scene) != "steady":
        facts.append(Fact("pace", pace(scene)))
        adjectives.insert(0, words[pace(scene)])
    noun = f"{', '.join(adjectives)} scene"
    text = f"a {noun} in {words[palette(scene)]} {teller.dialect.ground(scene.ground)}"
    openings = ["{}", "the theme is {}", "this is {}", "taken as a whole it is {}"]
    if not teller.terse:
        openings = ["the mood is that of {}", "all in all one sees {}", "the whole makes {}"]
    return Caption(sentence(teller.one(openings).format(text)), (Form((), tuple(facts)),))


def keywords(scene: Scene, teller: Teller) -> Caption:
    """Five to eight keywords in any order, as in PE-Video: what is there, not what belongs to what."""
    d = teller.dialect
    main, partner = scene.things[:2]
    facts = [Fact("any color", partner.color), Fact("any shape", partner.shape), Fact("tone", scene.ground[0])]
    facts += [Fact("any event", happening) for happening in dict.fromkeys(main.events)]
    facts.append(Fact("any shape", main.shape))
    optional = [Fact("any color", main.color), Fact("pattern", scene.ground[1])]
    if scene.camera[0] != "still":
        optional.append(Fact("any move", scene.camera[0]))
    facts += teller.random.sample(optional, teller.random.randint(0, len(optional)))
    teller.random.shuffle(facts)
    books = {"any color": d.colors, "any shape": d.shapes, "any event": d.verbs, "any move": d.moves}
    words = [books.get(fact.kind, {}).get(fact.value, fact.value) for fact in facts]
    words = [f"{word} background" if f.kind == "tone" else word for f, word in zip(facts, words, strict=True)]
    words = [f"camera {word}" if f.kind == "any move" else word for f, word in zip(facts, words, strict=True)]
    return Caption(", ".join(words), (Form((), tuple(facts)),))


def static(scene: Scene, teller: Teller) -> Caption:
    """What a still picture shows at rest: things, places, ground."""
    d = teller.dialect
    tell_place, tell_ground = teller.coin(0.7), teller.coin(0.6)
    nouns = tuple(_noun(thing, sized=teller.coin(0.4)) for thing in scene.things)
    phrases, facts = [], []
    for who, (noun, thing) in enumerate(zip(nouns, scene.things, strict=True)):
        phrases.append(f"{d.noun(noun)} {d.at(thing.place)}" if tell_place else d.noun(noun))
        facts += [Fact("at", thing.place, (who,))] if tell_place else []
    text = join(phrases)
    if tell_ground:
        text += f" {d.ground(scene.ground)}"
        facts.append(Fact("ground", scene.ground))
    openings = ["{}", "a picture of {}"] if teller.terse else ["the image shows {}"]
    return Caption(teller.one(openings).format(text), (Form(nouns, tuple(facts)),))


def story(clip: Clip, teller: Teller) -> Caption:
    """A long text on all scenes of a long video, as in LoVR's full captions."""
    ordinals = ("first", "second", "third", "fourth", "fifth", "sixth")
    d = teller.dialect
    texts = [f"The video is made of {len(clip)} scenes that follow each other with hard cuts."]
    forms = []
    for ordinal, scene in zip(ordinals, clip, strict=False):
        nouns = tuple(_noun(thing, sized=True) for thing in scene.things)
        facts: list[Fact] = [Fact("ground", scene.ground), Fact("count", len(nouns))]
        sentences = [f"the {ordinal} scene of the video is set {d.ground(scene.ground)}"]
        for who, (noun, thing) in enumerate(zip(nouns, scene.things, strict=True)):
            facts += [Fact("at", thing.place, (who,)), *_event_facts(thing, who)]
            verb = d.does(tuple(dict.fromkeys(thing.events)) or ("",))
            sentences.append(f"it shows {d.noun(noun)}")
            sentences.append(f"{d.noun(_noun(thing), 'the')} can be found {d.at(thing.place)} of the picture")
            sentences.append(f"all through the {ordinal} scene {d.noun(_noun(thing), 'the')} {verb}")
        sentences.append("nothing else is to be seen there besides the background")
        text = " ".join(sentence(s) for s in sentences)
        if len(nouns) > 1:
            text += " " + _relation_sentence(scene, 0, 1, teller)
            facts.append(Fact(relation(*scene.things[:2]), who=(0, 1)))
        texts.append(text)
        forms.append(Form(nouns, tuple(facts)))
    return Caption(" ".join(texts), tuple(forms))


KINDS: dict[str, Callable[[Scene, Teller], Caption]] = {
    "short": short,
    "paragraph": paragraph,
    "spatial": spatial,
    "temporal": temporal,
    "general": general,
    "main object": main_object,
    "detailed": detailed,
    "camera": camera,
    "theme": theme,
    "keywords": keywords,
    "static": static,
}
