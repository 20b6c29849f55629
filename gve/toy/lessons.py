"""What the tiny base learns from: scenes of its own, and questions about them with their answers.

A lesson is one picture or clip, or a text that tells one, and a conversation about it: short answers (a colour, a
place, one move) and captions. Scenes are drawn from a generator of their own, not from the foil groups that the test
sets and the training sources are made of; what those hold out stays held out here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from gve.toy import captions
from gve.toy.captions import Teller
from gve.toy.families import CELLS, Maker, is_held_out, legal_events, with_events
from gve.toy.forms import Fact, Form, Noun
from gve.toy.scenes import CAMERA_MOVES, DIRECTIONS, SIZES, STILL_CAMERA, Scene, Thing

# Dialect -> what is asked, in words that tell which dialect the answer is to have.
QUESTIONS = {
    "A": {
        "colour": "What colour is {one}?",
        "shape": "What is {one}?",
        "size": "How large is {one}?",
        "where": "Where is {one}?",
        "what": "What is {place}?",
        "relation": "How does {one} stand to {other}?",
        "places": "What is in each place, row by row?",
        "ground": "What is the background?",
        "count": "How many shapes are there?",
        "move": "What does {one} do?",
        "quarters": "What happens in each quarter?",
        "turn": "What happens {turn}?",
        "after": "What happens after {event}?",
        "camera": "What does the camera do?",
    },
    "B": {
        "colour": "Which colour does {one} have?",
        "shape": "Which figure is {one}?",
        "size": "Of what size is {one}?",
        "where": "In which place is {one}?",
        "what": "What do you see {place}?",
        "relation": "Seen from {other}, where is {one}?",
        "places": "Name what stands in every place, row after row.",
        "ground": "What stands behind everything?",
        "count": "What is the number of figures?",
        "move": "How does {one} behave?",
        "quarters": "Name what goes on in every quarter.",
        "turn": "What comes {turn}?",
        "after": "What comes after {event}?",
        "camera": "How is the camera led?",
    },
}
COUNTS = ("no", "one", "two", "three", "four", "five")
ORDINALS = ("first", "second", "third", "fourth")


@dataclass(frozen=True)
class Turn:
    """A question, its true answer, and the claim that the answer makes.

    Args:
        kind: colour, shape, size, place, relation, count, ground, move, order, camera, "list" (of the nine places, or
            of the four quarters of the time), or "caption".
        form: what the answer claims; the checker says whether another answer's form holds.
    """

    kind: str
    question: str
    answer: str
    form: Form


def random_scene(make: Maker, moving: bool = True) -> Scene:
    """A scene of one to five things in any cells, with any events, slides and camera; nothing held out."""
    while True:
        count = make.random.choices([1, 2, 3, 4, 5], [30, 35, 20, 10, 5])[0]
        places = make.pick(CELLS, count)
        things = list(make.things(places, [make.one(SIZES) for _ in places]))
        camera = STILL_CAMERA
        if moving:
            how = make.random.random()
            if how < 0.12:
                which = make.random.randrange(count)
                ways = (
                    make.pick(list(DIRECTIONS), 2) if make.random.random() < 0.3 else [make.one(list(DIRECTIONS))] * 2
                )
                things[which] = replace(things[which], slide=(ways[0], ways[1]))
            elif how < 0.80:
                _happen(make, things, places)
            if how >= 0.80 or make.random.random() < 0.15:
                camera = _film(make)
        # What moves most is what the scene is about; the others stand in reading order.
        things.sort(key=lambda thing: (-len(thing.events), thing.place[1], thing.place[0]))
        scene = make.scene(tuple(things), camera=camera)
        if not is_held_out((scene,)):
            return scene


def _happen(make: Maker, things: list[Thing], places: Sequence[tuple[int, int]]) -> None:
    """One event in each of one to four slots, each by any thing; sometimes one event in all slots."""
    if make.random.random() < 0.2:
        which = make.random.randrange(len(things))
        event = make.one(legal_events(places[which], places))
        things[which] = with_events(things[which], *((slot, event) for slot in range(4)))
        return
    if make.random.random() < 0.25:  # each for itself, two at once too
        for who, thing in enumerate(things):
            chosen = make.pick(range(4), make.random.randint(0, 2))
            things[who] = with_events(thing, *((slot, make.one(legal_events(places[who], places))) for slot in chosen))
        return
    slots: dict[int, list[tuple[int, str]]] = {}
    for slot in make.pick(range(4), make.random.choices([1, 2, 3, 4], [15, 25, 35, 25])[0]):
        who = make.random.randrange(len(things))
        slots.setdefault(who, []).append((slot, make.one(legal_events(places[who], places))))
    for who, events in slots.items():
        things[who] = with_events(things[who], *events)


def _film(make: Maker) -> tuple[str, str]:
    first = make.one(CAMERA_MOVES)
    if make.random.random() < 0.6:
        return first, first
    second = make.one(["still", *CAMERA_MOVES])
    return (first, second) if make.random.random() < 0.5 else (second, first)


def _name(thing: Thing) -> Noun:
    return Noun(thing.color, thing.shape)


def still_turns(scene: Scene, teller: Teller) -> Iterator[Turn]:
    """Every short question on what a picture at rest shows."""
    d, ask = teller.dialect, QUESTIONS[teller.dialect.name]
    by_place = {thing.place: thing for thing in scene.things}
    for thing in scene.things:
        shape, color, both = (d.noun(n, "the") for n in (Noun("", thing.shape), Noun(thing.color), _name(thing)))
        named = teller.one([both, shape, color])
        yield Turn(
            "colour", ask["colour"].format(one=shape), d.colors.get(thing.color, thing.color), Form((_name(thing),))
        )
        yield Turn("shape", ask["shape"].format(one=color), d.noun(Noun("", thing.shape)), Form((_name(thing),)))
        size = d.sizes.get(thing.size, thing.size)
        yield Turn("size", ask["size"].format(one=named), size, Form((_name(thing) | Noun("", "", thing.size),)))
        at = Form((_name(thing),), (Fact("at", thing.place, (0,)),))
        yield Turn("place", ask["where"].format(one=named), d.at(thing.place), at)
    for place in CELLS:
        found, question = by_place.get(place), ask["what"].format(place=d.at(place))
        if found:
            noun = _name(found) | Noun("", "", found.size)
            yield Turn("place", question, d.noun(noun), Form((noun,), (Fact("at", place, (0,)),)))
        elif teller.coin(0.2):
            yield Turn("place", question, "nothing", Form())
    for one in scene.things:
        for other in scene.things:
            if one is not other:
                kind = captions.relation(one, other)
                question = ask["relation"].format(one=d.noun(_name(one), "the"), other=d.noun(_name(other), "the"))
                yield Turn(
                    "relation", question, d.relations[kind], Form((_name(one), _name(other)), (Fact(kind, who=(0, 1)),))
                )
    words = [d.noun(_name(t) | Noun("", "", t.size)) if (t := by_place.get(place)) else "nothing" for place in CELLS]
    nouns = tuple(_name(thing) | Noun("", "", thing.size) for thing in scene.things)
    at_all = tuple(Fact("at", thing.place, (i,)) for i, thing in enumerate(scene.things))
    yield Turn("list", ask["places"], ", ".join(words), Form(nouns, at_all))
    ground = Form((), (Fact("ground", scene.ground),))
    yield Turn("ground", ask["ground"], d.ground(scene.ground), ground)
    count = len(scene.things)
    yield Turn("count", ask["count"], COUNTS[count], Form((), (Fact("count", count),)))


def moving_turns(scene: Scene, teller: Teller) -> Iterator[Turn]:
    """Every short question on what happens in a clip."""
    d, ask = teller.dialect, QUESTIONS[teller.dialect.name]
    for thing in scene.things:
        noun = _name(thing)
        named = d.noun(teller.one([noun, Noun("", thing.shape), Noun(thing.color)]), "the")
        happenings = tuple(dict.fromkeys(thing.events))
        facts = tuple(Fact("does", event, (0,)) for event in happenings) or (Fact("rests", who=(0,)),)
        yield Turn("move", ask["move"].format(one=named), d.does(happenings or ("",)), Form((noun,), facts))
    yield _quarters(scene, teller)
    steps = captions.timeline(scene) if one_at_a_time(scene) else []
    for i, (who, what) in enumerate(steps):
        told = f"{d.noun(_name(scene.things[who]), 'the')} {d.verbs[what]}"
        form = Form((_name(scene.things[who]),), (Fact("does", what, (0,)),))
        yield Turn("order", ask["turn"].format(turn=ORDINALS[i]), told, form)
        if i == len(steps) - 1:
            yield Turn("order", ask["turn"].format(turn="last"), told, form)
    for (who, what), (then_who, then_what) in pairwise(steps):
        if steps.count((who, what)) == 1:
            before = f"{d.noun(_name(scene.things[who]), 'the')} {d.verbs[what]}"
            after = f"{d.noun(_name(scene.things[then_who]), 'the')} {d.verbs[then_what]}"
            nouns = tuple(_name(scene.things[i]) for i in dict.fromkeys((who, then_who)))
            form = Form(nouns, (Fact("order", (what, then_what), (0, len(nouns) - 1)),))
            yield Turn("order", ask["after"].format(event=before), after, form)
    yield Turn("camera", ask["camera"], d.camera(scene.camera), Form((), (Fact("camera", scene.camera),)))


def _quarters(scene: Scene, teller: Teller) -> Turn:
    """What happens in each of the four slots."""
    d = teller.dialect
    told = []
    for slot in range(4):
        acts = [f"{d.noun(_name(t), 'the')} {d.verbs[t.course[slot]]}" for t in scene.things if t.course[slot]]
        told.append(" and ".join(acts) or "nothing")
    facts = tuple(Fact("does", e, (i,)) for i, t in enumerate(scene.things) for e in dict.fromkeys(t.course) if e)
    return Turn("list", QUESTIONS[d.name]["quarters"], ", ".join(told), Form(tuple(map(_name, scene.things)), facts))


def one_at_a_time(scene: Scene) -> bool:
    """Whether no slot holds two events, so that they have an order."""
    return all(sum(bool(thing.course[slot]) for thing in scene.things) <= 1 for slot in range(4))


def caption_turns(scene: Scene, teller: Teller, moving: bool) -> Iterator[Turn]:
    """Every caption that can be told of the scene."""
    several, steps = len(scene.things) > 1, captions.timeline(scene)
    in_order = bool(steps) and one_at_a_time(scene)
    kinds = ["static"]
    if moving:
        kinds = ["short", "detailed", "camera", "theme"]
        kinds += ["spatial", "paragraph", "keywords"] if several else []
        kinds += ["temporal"] if in_order else []
        kinds += ["general"] if in_order and several else []
        sizes = [thing.size for thing in scene.things]
        kinds += ["main object"] if sizes[0] == "large" and "large" not in sizes[1:] else []
    for kind in kinds:
        told = captions.KINDS[kind](scene, teller)
        request = (REQUESTS if teller.terse else OTHER_REQUESTS)[kind]
        yield Turn("caption", request, told.text, told.story[0])


# Kind of caption -> how it is asked for, in dialect A and in B.
REQUESTS = {
    "short": "Describe the video in one sentence.",
    "paragraph": "Tell what each shape does.",
    "spatial": "Describe where the shapes are.",
    "temporal": "Tell what happens in order.",
    "general": "Describe where the shapes are and what happens in order.",
    "main object": "Describe the main object.",
    "detailed": "Describe the video in detail.",
    "camera": "Describe the camera work.",
    "theme": "Describe the theme.",
    "keywords": "List keywords.",
    "static": "Describe the picture.",
}
OTHER_REQUESTS = {
    "short": "Say in one sentence what the video shows.",
    "paragraph": "Tell how each figure behaves.",
    "spatial": "Say where the figures stand.",
    "temporal": "Tell what comes after what.",
    "general": "Say where the figures stand and what comes after what.",
    "main object": "Say what the main figure is.",
    "detailed": "Say in detail what the video shows.",
    "camera": "Say how the camera is led.",
    "theme": "Say what the video is like.",
    "keywords": "Give keywords.",
    "static": "Say what the picture shows.",
}
