"""The toy world's rules as a captioner: true without a dose, false by the dose, at home in all of its own clips."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import jsonschema
import numpy as np
import pytest

from gve.items import Image, InputError, Part, Text, Video
from gve.synth.records import Reply, Request
from gve.toy import families, lessons
from gve.toy.captions import Teller
from gve.toy.claims import claim_shares, parse
from gve.toy.families import Maker
from gve.toy.flips import Told, flip
from gve.toy.language import DIALECTS
from gve.toy.oracle import Oracle, OracleOptions
from gve.toy.panels import panel_queries
from gve.toy.render import Shot, frames, render
from gve.toy.scenes import Clip, Scene, Thing
from gve.toy.truth import Truth
from gve.video import encode_jpeg

TEXT = {"type": "string", "minLength": 3, "maxLength": 1200}
STYLES = ("concise", "rich", "abstract", "keywords", "partial", "spatial", "temporal", "camera")


def flat(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


CAPTIONS = flat(**dict.fromkeys(STYLES, TEXT), level={"type": "string", "enum": ["child", "adult"]})


def question(id: str, *parts: Part, schema: dict[str, Any] = CAPTIONS, seed: int = 0) -> Request:
    return Request(id, "", (*parts, Text("Describe it.")), schema, "captions", seed=seed)


def ask(oracle: Oracle, requests: Sequence[Request]) -> list[Reply]:
    async def run() -> list[Reply]:
        await oracle.check()
        return [reply async for reply in oracle.ask(requests)]

    return asyncio.run(run())


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    """Any scenes of both dialects, foil groups that differ in the order of events only, and long videos."""
    drawn: list[Clip] = [(lessons.random_scene(Maker(f"oracle {look}", look)),) for look in "AB"]
    for look in "AB":
        make = Maker(f"oracle more {look}", look)
        drawn += [(lessons.random_scene(make),) for _ in range(15)]
    drawn += [clip for group in families.groups(families.care, 1, "oracle") for clip in group]
    return drawn + [clip for group in families.groups(families.long, 1, "oracle") for clip in group]


@pytest.fixture(scope="module")
def files(clips: list[Clip]) -> list[bytes]:
    return [render(Shot(clip)) for clip in clips]


@pytest.fixture(scope="module")
def truth(clips: list[Clip], files: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("oracle") / "truth.jsonl"
    Truth({hashlib.sha256(data).hexdigest(): clip for data, clip in zip(files, clips, strict=True)}).write(path)
    return path


def texts(replies: Sequence[Reply]) -> list[str]:
    """All captions, reply by reply, slot by slot."""
    return [reply.value[style] for reply in replies for style in STYLES]


def test_without_a_dose_every_claim_is_true(clips: list[Clip], files: list[bytes], truth: Path) -> None:
    """Of every style, of both dialects, of long videos; and all of it can be read. Of the next clip much is false."""
    replies = ask(Oracle(OracleOptions(str(truth))), [question(str(n), Video(data)) for n, data in enumerate(files)])
    assert [reply.id for reply in replies] == [str(n) for n in range(len(clips))]
    for reply in replies:
        assert reply.error == ""
        jsonschema.validate(reply.value, CAPTIONS)
    judged = [clip for clip in clips for _ in STYLES]
    tally = claim_shares(texts(replies), judged)
    assert tally.unparsed == ()
    assert {kind for kind, share in tally.shares.items() if share.value != 1.0} == set()
    assert len(tally.shares) >= 11
    other = claim_shares(texts(replies), [*judged[len(STYLES) :], *judged[: len(STYLES)]])
    assert sum(share.true for share in other.shares.values()) < 0.6 * sum(share.made for share in other.shares.values())


@pytest.mark.parametrize("dose", [0.1, 0.3])
def test_a_dose_makes_that_share_of_claims_false(
    dose: float, clips: list[Clip], files: list[bytes], truth: Path, tmp_path: Path
) -> None:
    """Within 4 standard errors of the dose by the checker, and the record says the same of each caption."""
    record = tmp_path / "record.jsonl"
    oracle = Oracle(OracleOptions(str(truth), dose=dose, seed=3, record=str(record)))
    replies = ask(oracle, [question(str(n), Video(data)) for n, data in enumerate(files)])
    tally = claim_shares(texts(replies), [clip for clip in clips for _ in STYLES])
    made = sum(share.made for share in tally.shares.values())
    false = made - sum(share.true for share in tally.shares.values())
    assert made > 1000
    assert abs(false / made - dose) < 4 * math.sqrt(dose * (1 - dose) / made) + 0.02  # a short text holds few lies
    assert tally.unparsed == ()
    rows = [json.loads(line) for line in record.read_text().splitlines()]
    assert [row["text"] for row in rows] == texts(replies)
    assert (sum(row["made"] for row in rows), sum(len(row["false"]) for row in rows)) == (made, false)
    kinds = {claim["kind"] for row in rows for claim in row["false"]}
    assert kinds >= {"colour", "shape", "place", "move", "ground", "camera", "count", "relation", "theme"}


def test_lies_are_drawn_by_seed_and_request_alone(files: list[bytes], truth: Path) -> None:
    requests = [question(str(n), Video(data)) for n, data in enumerate(files[:12])]
    options = OracleOptions(str(truth), dose=0.3, seed=1)
    first = ask(Oracle(options), requests)
    again = ask(Oracle(options), requests[::-1])[::-1]
    assert [reply.value for reply in first] == [reply.value for reply in again]
    other = ask(Oracle(OracleOptions(str(truth), dose=0.3, seed=2)), requests)
    assert all(one.value != two.value for one, two in zip(first, other, strict=True))
    seeded = ask(Oracle(options), [question(r.id, *r.parts[:1], seed=9) for r in requests])  # another attempt
    assert sum(one.value != two.value for one, two in zip(first, seeded, strict=True)) >= 10
    names = {
        Oracle(OracleOptions(str(truth), dose=dose, seed=seed)).fingerprint for dose in (0, 0.1) for seed in (0, 1)
    }
    assert len(names) == 4


def test_flip_makes_false_what_was_drawn_and_no_more() -> None:
    """A share of 0 changes nothing, 1 leaves little; a colour that is changed is changed all through the text."""
    scene = lessons.random_scene(Maker("flip"))
    while len(scene.things) != 2:
        scene = lessons.random_scene(Maker(repr(scene)))
    teller = Teller(DIALECTS["A"], random.Random(0))
    for turn in lessons.caption_turns(scene, teller, True):
        chance = random.Random(turn.question)
        assert flip(turn.answer, (scene,), 0.0, chance, teller.dialect).text == turn.answer
        wrong = flip(turn.answer, (scene,), 1.0, chance, teller.dialect)
        assert wrong == Told.read(wrong.text, (scene,))
        assert len(wrong.false) > wrong.made / 2, wrong
        assert not parse(wrong.text).unparsed
        assert not re.search(r"disc|box|hoop|plus|violet|turquoise|big|little", wrong.text)  # the other dialect's
    text = "There is a small pink ring at the top left. The pink ring blinks. A red cross blinks."
    blinks = ("", "blink", "", "")
    things = (Thing("pink", "ring", "small", (0, 0), blinks), Thing("red", "cross", "large", (1, 1), blinks))
    shown = (Scene(things, ("grey", "plain")),)
    assert not Told.read(text, shown).false
    told = {flip(text, shown, 0.5, random.Random(n), teller.dialect).text for n in range(60)}
    assert len(told) > 20
    for one in told:  # whatever the first thing is called, it is called so again
        first, second, _ = one.split(". ")
        assert re.search(r"(\w+ \w+) (?:at|in) the", first)[1] in second, one
    assert any("The orange ring blinks" in one for one in told)


def encoded(pictures: Sequence[np.ndarray], crf: str) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": crf})
        stream.width = stream.height = 84
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def test_media_are_known_again_after_a_repair_and_in_part(clips: list[Clip], truth: Path) -> None:
    """Encoded anew, much smaller: the same clip, also where its neighbours show the same pictures in another order."""
    own = Truth.read(truth)
    assert list(own.clips.values()) == clips
    for clip in clips:
        pictures = frames(Shot(clip))
        assert own.of(Video(encoded(pictures, "32"))) == clip
        if len(clip) > 1:  # the second scene, cut out
            size = len(pictures) // len(clip)
            assert own.of(Video(encoded(pictures[size : 2 * size], "23"))) == clip[1:2]
        still = own.of(Image(encode_jpeg(pictures[15 if len(clip) == 1 else 7], 70)))
        assert [(thing.color, thing.shape, thing.place) for thing in still[0].things] == [
            (thing.color, thing.shape, thing.place) for thing in clip[0].things
        ]


def test_what_is_not_of_the_toy_world_is_said_so(files: list[bytes], truth: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (84, 84, 3), np.uint8)
    strange = [question("noise", Image(noise)), question("size", Image(noise[:50]))]
    strange += [question("cut", Video(files[0][:3000])), question("gone", Video(tmp_path / "gone.mp4"))]
    strange += [question("none"), question("good", Video(files[0]))]
    replies = {reply.id: reply.error for reply in ask(Oracle(OracleOptions(str(truth))), strange)}
    assert replies == {
        "noise": "unknown medium",
        "size": "media not-an-image",
        "cut": "media not-a-video",
        "gone": "media missing",
        "none": "unknown medium",
        "good": "",
    }
    picture = Image(encode_jpeg(frames(Shot(Truth.read(truth).clips[hashlib.sha256(files[0]).hexdigest()]))[15]))
    (still,) = ask(Oracle(OracleOptions(str(truth))), [question("still", picture)])
    assert not claim_shares([still.value["keywords"]], [Truth.read(truth).of(picture)]).unparsed
    assert still.value["keywords"].count(",") >= 3
    with pytest.raises(InputError, match="holds no truth of the toy world"):
        ask(Oracle(OracleOptions(str(tmp_path / "gone.jsonl"))), strange[:1])
    with pytest.raises(InputError, match=r"dose 1\.5"):
        OracleOptions(str(truth), dose=1.5)


def test_a_change_names_what_the_reference_does_not_show(tmp_path: Path) -> None:
    """References and targets of the panels: the query tells the change in the panels' own words."""
    schema = flat(query=TEXT)
    requests, expected, shown = [], [], {}
    for modality in ("TI", "TV"):
        for panel in panel_queries(modality, 3, "oracle"):
            query = panel.queries[5]
            target = render(Shot(panel.clips[query.positive]))
            shown[hashlib.sha256(target).hexdigest()] = panel.clips[query.positive]
            spec = query.image or query.video
            assert spec is not None
            reference = render(spec)
            shown[hashlib.sha256(reference).hexdigest()] = (spec.scene,) if query.image else spec.clip
            part = Image(reference) if query.image else Video(reference)
            requests.append(question(f"{modality} {len(requests)}", part, Video(target), schema=schema))
            expected.append(query)
    Truth(shown).write(tmp_path / "truth.jsonl")
    replies = ask(Oracle(OracleOptions(str(tmp_path / "truth.jsonl"))), requests)
    for reply, query in zip(replies, expected, strict=True):
        said = reply.value["query"]
        # What the panel's own wording tells: an action, a ground, a partner, a performer, or the camera.
        words = set(query.text.replace(",", "").split()) - {"the", "same", "shape", "now", "it", "and", "beside", "a"}
        words -= {"together", "with", "stands", "but", "scene", "action", "by", "camera", "an", "on", "background"}
        assert words <= set(said.split()), (said, query.text)
        assert said.startswith("the same")
