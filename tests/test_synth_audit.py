"""The audit of a synthesis: what a sample says of all captions, what a benchmark shares, and the page that shows it."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import io
import json
import math
import random
import shutil
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import av
import numpy as np
import pytest
import yaml
from PIL import Image as PILImage

from gve.cli import main
from gve.data.exclusion import read_exclusions
from gve.data.sources import open_sources
from gve.items import Image, InputError, Text, Video
from gve.synth.audit.census import Census, count_tasks, words_of
from gve.synth.audit.contamination import FrameIndex, TextIndex, Thresholds, hash_medium, hash_of_scan
from gve.synth.audit.drawn import Drawn
from gve.synth.audit.judge import (
    KINDS,
    TOGETHER,
    Check,
    Told,
    captions_of,
    claims_schema,
    read_material,
    verdicts_schema,
)
from gve.synth.audit.notes import Notes
from gve.synth.audit.rates import rate, student, wilson
from gve.synth.audit.run import AuditOptions, audit
from gve.synth.config import make_plan, read_config
from gve.synth.crew import run
from gve.synth.enrich import EnrichOptions
from gve.synth.extend import TASKS
from gve.synth.folder import Rows, StepFolder
from gve.synth.local import LocalCaptioner, LocalOptions
from gve.synth.media import MediaStore
from gve.synth.records import Reply, Request
from gve.synth.replies import read_reply
from gve.synth.units import Row, deciding
from gve.synth_cli import CAPTIONERS
from gve.toy import captions, families, judging
from gve.toy.base import random_twin
from gve.toy.captions import Teller
from gve.toy.claims import claim_shares, parse
from gve.toy.families import Maker
from gve.toy.language import DIALECTS
from gve.toy.lessons import caption_turns, random_scene
from gve.toy.oracle import Oracle, OracleOptions
from gve.toy.render import Shot, frames, render
from gve.toy.scenes import Clip
from gve.toy.truth import Truth
from gve.video import encode_jpeg
from test_page import Links

CLIPS = 28
STYLES = ("concise", "spatio-temporal rich", "abstract", "keywords only", "partially relevant")
HOSTILE = '<script>alert("x")</script> & "quoted"'


@dataclasses.dataclass(frozen=True)
class World:
    """Runs over the same toy clips: a whole one with 10% lies, and one with 30% that ends with its captions."""

    folder: Path
    clips: dict[str, Clip]  # row id -> what it shows
    truth: Path
    config: Path

    def out(self, dose: str) -> Path:
        return self.folder / dose

    def rows(self, dose: str) -> list[Row]:
        return list(Rows(StepFolder(self.out(dose), "enrich").slices()))

    def oracle(self) -> Oracle:
        return Oracle(OracleOptions(str(self.truth)))

    def false_share(self, dose: str) -> float:
        """Of all captions of all videos and frames, by the checker."""
        told = [told for row in self.rows(dose) for told in captions_of(row)]
        tally = claim_shares([one.text for one in told], [self.clips[one.video] for one in told])
        made = sum(share.made for share in tally.shares.values())
        return 1 - sum(share.true for share in tally.shares.values()) / made


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("audit")
    make, clips, truth, rows = Maker("audit"), {}, {}, []
    for i in range(CLIPS):
        clip: Clip = (random_scene(make),)
        data = render(Shot(clip))
        (folder / f"{i}.mp4").write_bytes(data)
        (folder / f"{i}.part").write_bytes(render(Shot(clip, 16)))
        clips[f"web:{i}"] = truth[hashlib.sha256(data).hexdigest()] = clip
        rows.append({"id": str(i), "video": f"{i}.mp4", "caption": HOSTILE})
    Truth(truth).write(folder / "truth.jsonl")
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sections = {
        "input": {"sources": [{"path": str(folder / "list.jsonl"), "name": "web"}]},
        "scan": {"class": "test_synth_extend:Cut"},
        "select": {"class": "test_synth_extend:Keep"},
        "enrich": {
            "ask": {"T2I": 0.4, "TI2V": 0.3, "TV2V": 0.3},
            "words": {style: [1, 400] for style in STYLES},
            "frame_words": {"concise": [1, 200], "detailed": [1, 200]},
            "short_words": 0,
            "long_words": 0,
            "min_captions": 1,
            "boilerplate": False,
            "referring": False,
        },
        "extend": {"text_only_k": 0},
        "captioner": {"kind": "oracle", "truth": str(folder / "truth.jsonl")},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(sections))
    for dose, until in (("0.1", ""), ("0.3", "enrich")):
        values = read_config(path, [f"captioner.dose={dose}"])
        run(make_plan(values, folder / dose, captioners=CAPTIONERS, until=until), until)
    return World(folder, clips, folder / "truth.jsonl", path)


def command(*words: object) -> int:
    """Exit code of `gve synth`."""
    with pytest.raises(SystemExit) as end:
        main(["synth", *map(str, words)])
    return int(end.value.code or 0)


# ---------------------------------------------------------------------------------------------------------- intervals


def test_intervals_of_single_claims_are_wilsons() -> None:
    """Reference values of Wilson's interval (Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29)."""
    for false, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)):
        found = rate([True] * false + [False] * (count - false), [str(n) for n in range(count)])
        assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
        assert found.videos == found.decided == count
    assert wilson(1 / 29, 29, 1.959964) == (pytest.approx(0.0061, abs=5e-5), pytest.approx(0.1718, abs=5e-5))
    for freedom, quantile in ((4, 2.776), (9, 2.262), (19, 2.093), (99, 1.984)):  # of any table
        assert student(1.959964, freedom) == pytest.approx(quantile, rel=3e-3)
    assert rate([], []).value is None


def test_claims_of_one_video_count_together() -> None:
    """All claims of a video alike: as if each video had one; equally mixed videos: no wider than single claims."""
    videos = [f"v{n // 10}" for n in range(400)]
    alike = rate([n // 10 % 4 == 0 for n in range(400)], videos)
    assert alike.value == 0.25
    low, high = wilson(0.25, 39.0, student(1.959964, 39))  # (m - 1) / m x 40 claims, by hand
    assert (alike.low, alike.high) == (pytest.approx(low), pytest.approx(high))
    mixed = rate([n % 10 < 4 for n in range(400)], videos)
    assert (mixed.low, mixed.high) == tuple(pytest.approx(v, abs=2e-3) for v in wilson(0.4, 400, 2.023))
    one = rate([True, False, False], ["v"] * 3)
    assert one.low is not None
    assert one.high is not None
    assert one.high - one.low > 0.75  # one video tells next to nothing
    none = rate([False] * 400, videos)
    assert none.high == pytest.approx(wilson(0.0, 40, 2.023)[1], rel=1e-3)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Videos whose captions fail together, 400 draws of each setting: 92.5 to 98.5%; single claims hold far less."""
    chance = np.random.default_rng(0)
    for videos, each, share, spread in ((12, 10, 0.1, 0.05), (40, 15, 0.1, 0.1), (60, 6, 0.3, 0.2)):
        held = alone = 0
        for _ in range(400):
            sizes = chance.poisson(each, videos) + 1
            own = chance.beta(share * (1 - spread) / spread, (1 - share) * (1 - spread) / spread, videos)
            false = (chance.random(sizes.sum()) < np.repeat(own, sizes)).tolist()
            found = rate(false, np.repeat(np.arange(videos), sizes).astype(str).tolist())
            assert found.low is not None
            assert found.high is not None
            held += found.low <= share <= found.high
            low, high = wilson(found.value or 0.0, found.decided, 1.96)
            alone += low <= share <= high
        assert 0.925 <= held / 400 <= 0.985, (videos, held)
        assert alone / 400 < 0.91, (videos, alone)


# ------------------------------------------------------------------------------------------------------ the judge pass


def test_what_is_asked(world: World) -> None:
    """Text alone first, then pictures with caption and claims; a caption of many claims in several requests."""
    clip = next(clip for group in families.groups(families.long, 1, "audit") for clip in group if len(clip) > 2)
    text = captions.story(clip, Teller(DIALECTS[clip[0].look], random.Random(0))).text
    video = world.folder / "long.mp4"
    video.write_bytes(render(Shot(clip)))
    told = Told("v/0", "v", "video", "concise", text, {"file": str(video)})
    check = Check(MediaStore(world.folder))
    talk = check.work({"id": told.id, "told": dataclasses.asdict(told)})
    (split,) = next(talk)
    assert not any(isinstance(part, Video | Image) for part in split.parts)
    assert split.schema == claims_schema()
    assert read_material(split) == (text, {})
    assert all(kind in split.system for kind in KINDS)
    claims = read_reply(json.dumps(judging.split(text)), split.schema)
    asked = talk.send([Reply(split.id, claims)])
    assert len(asked) > 1
    assert len({request.id for request in (split, *asked)}) == len(asked) + 1
    shown = [read_material(request) for request in asked]
    numbered = {key: claim for _, own in shown for key, claim in own.items()}
    assert {own for own, _ in shown} == {text}
    assert list(numbered) == [str(number) for number in range(1, len(numbered) + 1)]
    assert sorted(numbered.values()) == sorted(claim for own in claims.values() for claim in own)
    for request, (_, own) in zip(asked, shown, strict=True):
        assert isinstance(request.parts[0], Video)
        assert request.schema == verdicts_schema(list(own))
        assert len(own) <= TOGETHER
    with pytest.raises(StopIteration) as end:
        talk.send([Reply(request.id, dict.fromkeys(read_material(request)[1], "true")) for request in asked])
    (row,) = end.value.value.rows
    assert [claim["claim"] for claim in row["claims"]] == list(numbered.values())
    assert {claim["verdict"] for claim in row["claims"]} == {"true"}


def test_schemas_bind_a_local_model(world: World) -> None:
    """Both schemas are ones that a reply can be bound to, token by token; any model's reply then fits."""
    random_twin(world.folder / "base")
    captioner = LocalCaptioner(LocalOptions(base=str(world.folder / "base"), temperature=0.0, replies=1))
    requests = [
        Request("verdicts", "", (Text("Judge."),), verdicts_schema(["1", "2", "3"]), "verdicts", 100),
        Request("claims", "", (Text("Split."),), claims_schema(), "claims", 60),
    ]

    async def ask() -> dict[str, Reply]:
        return {reply.id: reply async for reply in captioner.ask(requests)}

    replies = asyncio.run(ask())
    assert set(replies["verdicts"].value) == {"1", "2", "3"}
    assert replies["claims"].error in ("", "length")  # random weights rarely end a list; what they wrote is one
    assert replies["claims"].text.startswith('{"things": [')


def test_the_toy_judge_says_what_the_checker_says() -> None:
    """Sentences stand for claims one to one; of the clip all are true, of another one as the checker counts."""
    make = Maker("judge")
    clips: list[Clip] = [(random_scene(make),) for _ in range(12)]
    clips += [clip for group in families.groups(families.long, 1, "judge") for clip in group]
    for clip, other in zip(clips, clips[1:] + clips[:1], strict=True):
        teller = Teller(DIALECTS[clip[0].look], random.Random(0))
        texts = [captions.story(clip, teller).text]
        if len(clip) == 1:
            texts = [turn.answer for turn in caption_turns(clip[0], teller, True)]
        for text in texts:
            claims = parse(text).claims
            sentences = [claim for own in judging.split(text).values() for claim in own]
            assert len(set(sentences)) == len(claims)
            read_reply(json.dumps(judging.split(text)), claims_schema())
            numbered = {str(number): claim for number, claim in enumerate(sentences)}
            for shown in (clip, other):
                tally = claim_shares([text], [shown])
                found = list(judging.verdicts(text, numbered, shown).values())
                assert found.count("true") == sum(share.true for share in tally.shares.values())
                assert found.count("cannot tell") == sum(share.unjudged for share in tally.shares.values())
    assert judging.verdicts("A red ring blinks.", {"1": "the moon is blue"}, clips[0]) == {"1": "cannot tell"}


@pytest.mark.parametrize("dose", ["0.1", "0.3"])
def test_the_interval_holds_what_the_checker_counts(world: World, dose: str) -> None:
    """A sample of 90 captions speaks for all 230, and for the planted rate; the other dose lies outside."""
    found = audit(world.out(dose), AuditOptions(sample=90, seed=3), world.oracle).report["judge"]
    everything = found["all"]
    assert found["judged"] == 90
    assert everything["low"] <= world.false_share(dose) <= everything["high"]
    assert everything["low"] <= float(dose) <= everything["high"]
    other = "0.3" if dose == "0.1" else "0.1"
    assert not everything["low"] <= world.false_share(other) <= everything["high"]
    assert not everything["low"] <= float(other) <= everything["high"]
    assert sum(row["decided"] for row in found["by_kind"].values()) == everything["decided"]
    assert sum(row["false"] for row in found["by_style"].values()) == everything["false"]
    assert {style.split(": ")[0] for style in found["by_style"]} == {"video", "frame"}
    assert not found["same_model"]


def test_all_captions_judged_are_the_checkers_count(world: World) -> None:
    """Without a sample the rate is the checker's, claim for claim."""
    found = audit(world.out("0.3"), AuditOptions(sample=10_000), world.oracle).report["judge"]["all"]
    assert found["value"] == pytest.approx(world.false_share("0.3"), abs=1e-12)


def test_samples_follow_from_ids_and_seed() -> None:
    def drawn(ids: Iterable[int], size: int, seed: int = 0, purpose: str = "x") -> list[int]:
        own: Drawn[int] = Drawn(size, seed, purpose)
        for id in ids:
            own.offer(str(id), id)
        return own.entries()

    sample = drawn(range(1000), 50)
    assert drawn(reversed(range(1000)), 50) == sample
    assert drawn(range(1000), 20) == sample[:20]
    assert len(set(sample)) == 50
    assert set(drawn(range(1000), 50, seed=1)) != set(sample) != set(drawn(range(1000), 50, purpose="y"))
    counts = np.bincount([one for seed in range(400) for one in drawn(range(10), 3, seed)], minlength=10)
    assert abs(counts - 120).max() < 4 * math.sqrt(400 * 0.3 * 0.7)  # each as often
    assert drawn(range(3), 0) == []


class Stopping(Oracle):
    """The oracle until it was asked so often, then the end; counts what it is asked."""

    def __init__(self, options: OracleOptions, after: int = 10**9) -> None:
        super().__init__(options)
        self.after, self.asked = after, 0

    async def ask(self, requests: Iterable[Request]) -> AsyncIterator[Reply]:
        async for reply in super().ask(requests):
            self.asked += 1
            if self.asked > self.after:
                raise KeyboardInterrupt
            yield reply


def test_an_interrupted_audit_goes_on(world: World, tmp_path: Path) -> None:
    """What was answered is not asked again, a torn line is; the report is that of an audit without a pause."""
    out = tmp_path / "run"
    shutil.copytree(world.out("0.3"), out)
    shutil.rmtree(out / "audit", ignore_errors=True)
    options = AuditOptions(sample=20)
    broken = Stopping(OracleOptions(str(world.truth)), after=17)
    with pytest.raises(KeyboardInterrupt):
        audit(out, options, lambda: broken)
    (notes,) = (out / "audit").glob("replies-*.jsonl")
    assert len(notes.read_bytes().splitlines()) == 17
    notes.write_bytes(notes.read_bytes() + b'{"key": "torn')
    rest = Stopping(OracleOptions(str(world.truth)))
    found = audit(out, options, lambda: rest)
    whole = Stopping(OracleOptions(str(world.truth)))
    shutil.rmtree(out / "audit")
    assert audit(out, options, lambda: whole).report == found.report
    assert rest.asked == whole.asked - 17
    again = Stopping(OracleOptions(str(world.truth)))
    assert audit(out, dataclasses.replace(options, sample=10), lambda: again).report["judge"]["judged"] == 10
    assert again.asked == 0  # the smaller sample is a part of the larger one


def test_notes_survive_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "notes.jsonl"
    notes = Notes(path)
    notes.put("a", {"x": 1})
    notes.put("b", "\ud83d")
    notes.close()
    path.write_bytes(path.read_bytes()[:-4])
    notes = Notes(path)
    assert (notes.get("a"), notes.get("b")) == ({"x": 1}, None)
    notes.put("c", 3)
    notes.close()
    assert [json.loads(line)["key"] for line in path.read_bytes().splitlines()] == ["a", "c"]


@dataclasses.dataclass(frozen=True)
class MuteOptions:
    every: int = 1


class Mute:
    """A judge that answers nothing to each `every`th request, and takes each caption for one true claim."""

    Options: ClassVar[type] = MuteOptions
    fingerprint = "mute"

    def __init__(self, options: MuteOptions) -> None:
        self.options = options

    async def check(self) -> None:
        await asyncio.sleep(0)

    async def ask(self, requests: Iterable[Request]) -> AsyncIterator[Reply]:
        for number, request in enumerate(requests, 1):
            if number % self.options.every == 0:
                yield Reply(request.id, None, "prose", "schema: $: no object")
                continue
            caption, claims = read_material(request)
            told = {**dict.fromkeys(KINDS, ()), "things": [caption[:100]]}
            yield Reply(request.id, dict.fromkeys(claims, "cannot tell") if claims else told)


def test_a_judge_that_fails_is_said_so(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of an open run, without a benchmark: exit code 1, and the page says what there is not."""
    page = tmp_path / "page.html"
    words = ["audit", world.out("0.3"), "--sample", "12", "--html", page, "--json", "--judge", "test_synth_audit:Mute"]
    assert command(*words) == 1
    printed = capsys.readouterr()
    assert "failed: the judge gave no valid reply (12 schema)" in printed.err
    found = json.loads(printed.out)
    assert found["judge"]["failed"] == {"schema": 12}
    assert found["open_steps"] == ["extend", "output"]
    assert {row["made"] for row in found["tasks"].values()} <= {0}
    text = page.read_text()
    for said in ("The run is not finished", "12 of 12 captions could not be judged (12 schema)", "No pair has been"):
        assert said in text
    assert "Not compared with a benchmark" in text


def test_what_some_replies_lack_is_counted(world: World) -> None:
    """Every fourth question without an answer; a judge that never decides gives no rate."""
    found = audit(world.out("0.3"), AuditOptions(sample=12), lambda: Mute(MuteOptions(4))).report["judge"]
    assert found["judged"] + sum(found["failed"].values()) == 12
    assert found["failed"]["schema"] > 0
    rates = {"false": 0, "decided": 0, "videos": 0, "untold": found["judged"], "value": None, "low": None, "high": None}
    assert found["all"] == rates


# ------------------------------------------------------------------------------------------------------- distributions


def caption(text: str, style: str, **cues: float) -> dict[str, Any]:
    return {"text": text, "style": style, "words": len(text.split()), "cues": cues, "prompt": ""}


def row_of(id: str, profile: str, *texts: dict[str, Any], **more: Any) -> Row:
    own = {"profile": profile, "readability": "easy", "education": "college", "captions": list(texts), "composed": {}}
    return {"id": id, "caption": "", "video": {"file": f"{id}.mp4"}, "enrichment": own | more}


def test_the_census_counts_what_is_there() -> None:
    """Two videos by hand."""
    long = " ".join(f"word{n}" for n in range(100))
    rows = [
        row_of("a", "temporal", caption("A dog runs.", "concise", temporal=1.0), caption("a, dog", "keywords only")),
        row_of(
            "b",
            "spatial",
            caption("a dog RUNS", "concise", spatial=0.5, theme=0.5),
            caption(long, "concise"),
            frame={"image": {}, "captions": [caption("go on go on go on go on go on", "detailed")]},
        ),
    ]
    options = deciding(EnrichOptions(profiles={"temporal": 0.75, "spatial": 0.25}, short_words=6, long_words=99))
    census = Census(options, 0)
    for row in rows:
        census.add(row)
    found = census.result()
    assert (found["videos"], found["captions"], found["spread"]) == (2, 5, 0.5)
    assert {name: (row["count"], row["asked"]) for name, row in found["profiles"].items()} == {
        "temporal": (1, 0.75),
        "spatial": (1, 0.25),
        "other": (0, 0.0),
    }
    assert found["levels"]["readability"]["easy"]["asked"] == 0.2
    assert found["levels"]["readability"]["plain"]["count"] == 0
    concise = found["styles"]["video"]["concise"]
    assert (concise["count"], concise["asked"], concise["fewest"], concise["median"], concise["most"]) == (
        *(3, [10, 25], 3, 3.0, 100),
    )
    assert concise["inside"] == 0.0
    assert concise["words"] == {"3": 2, "100": 1}
    assert list(found["styles"]["frame"]) == ["detailed"]
    assert found["cues"]["spatial"] == {"spatial": 0.5, "temporal": 0.0, "theme": 0.5}
    language = found["language"]
    assert language["repeated"] == 2 / 5  # "A dog runs." is told twice, whatever its case
    assert language["looping"] == 1 / 5  # "go on go on" stands there more than three times
    assert language["words"] == 3 + 2 + 3 + 100 + 10
    assert language["distinct"]["1"] == (3 + 100 + 2) / 118
    assert language["openings"][0] == ["a dog runs", 2 / 5]
    made = [{"task": task} for task in ("T2V", "T2V", "V2V")]
    assert count_tasks({"T2V": 1.0, "V2V": 0.25}, 2, made, made[:1]) == {
        "T2V": {"asked": 2, "made": 2, "written": 1},
        "V2V": {"asked": 1, "made": 1, "written": 0},
    }


def test_words_are_told_apart_in_any_script() -> None:
    assert words_of("It\u2019s A dog-run, na\u00efve; \u0441\u043e\u0431\u0430\u043a\u0430 42!") == [
        *("it\u2019s", "a", "dog", "run", "na\u00efve", "\u0441\u043e\u0431\u0430\u043a\u0430", "42")
    ]


# ------------------------------------------------------------------------------------------------------- contamination


def test_shared_words_are_found_by_their_number() -> None:
    """13 in a row and not 12, whatever case and punctuation; short texts as a whole, and very short ones never."""
    own = [f"w{n}" for n in range(30)]
    index = TextIndex(
        [("S/long", " ".join(own)), ("S/short", "A man plays the piano."), ("S/tiny", "a dog")], Thresholds()
    )
    assert index.find("x y " + ", ".join(own[5:18]).upper() + " z") == ("text-ngram", "S/long", 13, " ".join(own[5:18]))
    assert index.find("x y " + " ".join(own[5:17]) + " z " + " ".join(own[18:29])) is None
    found = index.find(" ".join(own[2:20] + ["x"] * 9))
    assert found is not None
    assert found[2] == 18
    assert index.find("a man PLAYS the piano") == ("text-exact", "S/short", 5, "a man plays the piano")
    assert index.find("a man plays the piano loudly") is None
    assert index.find("a dog") is None
    assert TextIndex([], Thresholds()).find(" ".join(own)) is None


def test_the_text_index_equals_a_search_by_hand() -> None:
    """Random texts over few words, 5-grams: found exactly where sets of n-grams meet."""
    chance = random.Random(0)
    texts = [[chance.choice("abcdef") for _ in range(chance.randint(5, 30))] for _ in range(60)]
    index = TextIndex([(str(n), " ".join(text)) for n, text in enumerate(texts)], Thresholds(ngram=5, min_words=5))
    known = {tuple(text[at : at + 5]) for text in texts for at in range(len(text) - 4)}
    hits = 0
    for _ in range(300):
        asked = [chance.choice("abcdef") for _ in range(chance.randint(5, 12))]
        expected = any(tuple(asked[at : at + 5]) in known for at in range(len(asked) - 4))
        found = index.find(" ".join(asked))
        assert (found is not None) == expected
        if found:
            hits += 1
            assert f" {found[3]} " in f" {' '.join(asked)} "
            assert f" {found[3]} " in f" {' '.join(texts[int(found[1])])} "
    assert 50 < hits < 290


def encoded(pictures: Sequence[np.ndarray], side: int, crf: str) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": crf})
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            small = np.asarray(PILImage.fromarray(picture).resize((side, side)))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(small, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def test_copies_of_videos_are_found_and_others_are_not(world: World) -> None:
    """Resized, with a third of the bits; as a picture; and none of the rest."""
    clips = list(world.clips.values())
    pictures = [frames(Shot(clip)) for clip in clips[:14]]
    index = FrameIndex(
        {f"S/{n}": hash_medium(Video(encoded(own, 64, "32"))) for n, own in enumerate(pictures)}, Thresholds()
    )
    own = [hash_medium(Video(world.folder / f"{n}.mp4")) for n in range(CLIPS)]
    found = {n: hit[0] for n, signature in enumerate(own) if (hit := index.find(signature))}
    assert found == {n: f"S/{n}" for n in range(14)}
    still = FrameIndex({"S/picture": hash_medium(Image(encode_jpeg(pictures[3][15], 70)))}, Thresholds())
    assert [n for n, signature in enumerate(own) if still.find(signature)] == [3]
    assert hash_of_scan({"id": "x", "quality": {"hash": own[0]}}) == own[0]
    assert hash_of_scan({"id": "x", "quality": {"hash": own[0][16:]}}) == ""  # of seven frames
    assert hash_of_scan({"id": "x"}) == ""
    assert FrameIndex({}, Thresholds()).find(own[0]) is None


@pytest.fixture(scope="module")
def benchmark(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MSRVTT of three clips: one of the run anew, one damaged, one of its own; a caption of the run is asked."""
    root = tmp_path_factory.mktemp("uvrb")
    folder = root / "MSRVTT"
    (folder / "jsonl").mkdir(parents=True)
    (folder / "videos").mkdir()
    copied = frames(Shot(world.clips["web:0"]))
    (folder / "videos" / "copy.mp4").write_bytes(encoded(copied, 64, "30"))
    (folder / "videos" / "bad.mp4").write_bytes(b"no video")
    (folder / "videos" / "own.mp4").write_bytes(render(Shot((random_scene(Maker("benchmark")),))))
    (text,) = {
        told.text for row in world.rows("0.1") if row["id"] == "web:7" for told in captions_of(row)
        if told.of == "video" and told.style == "spatio-temporal rich"
    }  # fmt: skip
    listings = {
        "queries": [{"id": "q0", "text": f"Look: {text.upper()}"}, {"id": "q1", "text": "nothing that anyone says"}],
        "corpus": [{"id": name, "video": f"{name}.mp4"} for name in ("copy", "bad", "own")],
        "instances": [{"qid": "q0", "pos": ["own"]}, {"qid": "q1", "pos": ["copy"]}],
    }
    for name, rows in listings.items():
        (folder / "jsonl" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def shared(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "audit" / "exclude.jsonl").read_text().splitlines()]


def test_what_the_benchmark_has_is_left_out(
    world: World, benchmark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The list names copy and caption; `synth run` and `shards build` leave them out and count them."""
    out = tmp_path / "run"
    shutil.copytree(world.out("0.1"), out)
    found = audit(out, AuditOptions(uvrb=(benchmark,))).report["contamination"]
    assert found["not_decoded"] == {"benchmark": {"not-a-video": 1}, "run": {}}
    assert found["videos_compared"] == CLIPS
    ids = read_exclusions(out / "audit" / "exclude.jsonl")
    assert {"web:0", "web:7"} <= ids
    by_id = {match["id"]: match for match in shared(out)}
    assert by_id["web:0"]["reason"] == "video"
    assert by_id["web:0"]["match"] == "MSRVTT/videos/copy.mp4"
    assert (by_id["web:7"]["reason"], by_id["web:7"]["match"]) == ("text-ngram", "MSRVTT/queries/q0")
    # Toy captions are made by rule, so others share 13 words too: each does, word by word.
    for match in shared(out):
        if match["reason"] == "text-ngram":
            (row,) = (row for row in world.rows("0.1") if row["id"] == match["id"])
            assert any(match["detail"] in " ".join(words_of(told.text)) for told in captions_of(row))
            assert match["score"] >= 13
    assert [match["id"] for match in shared(out) if match["reason"] == "video"] == ["web:0"]
    made = Rows(StepFolder(out, "extend").slices())
    left = sum(pair["of"][0] in ids for pair in made)
    again = ["run", "--config", world.config, "--out", out, "--json", "--redo", "output", "--set", "captioner.dose=0.1"]
    assert command(*again, f"output.exclude={out / 'audit' / 'exclude.jsonl'}") == 0
    funnel = json.loads(capsys.readouterr().out)
    assert funnel["steps"][-1]["rejected"] == {"contaminated": left}
    assert left > 2
    kept = [
        json.loads(source.members(place)["json"])["provenance"]["of"][0]
        for source in open_sources(out / "shards").values()
        for place in range(len(source))
    ]
    assert not ids & set(kept)
    assert len(kept) == len(made) - left


def test_shards_are_built_without_what_is_listed(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a row's own id or with its source before it; a row without an id stays; counted, and named when none fits."""
    rows = [{"id": str(n), "query": {"text": f"text {n}"}, "target": {"video": f"{n}.mp4"}} for n in range(5)]
    del rows[4]["id"]
    listing = world.folder / "clips.jsonl"
    listing.write_text("\n".join(map(json.dumps, rows)))
    excluded = tmp_path / "exclude.jsonl"
    excluded.write_text('{"id": "mine:1", "reason": "video"}\n\n3\n{"id": "other:2"}\n')

    def build(name: str, *more: str) -> dict[str, Any]:
        words = ["shards", "build", str(listing), str(tmp_path / name), "--source", "mine", "--instruction", "Find it."]
        with pytest.raises(SystemExit) as end:
            main([*words, "--json", *more])
        assert not end.value.code
        return json.loads(capsys.readouterr().out)

    assert build("all")["dropped"] == {}
    assert build("some", "--exclude", str(excluded)) == {
        "samples": {"mine": 3},
        "rejected": {},
        "dropped": {"contaminated": 2},
    }
    source = open_sources(tmp_path / "some")["mine"]
    assert [source.read(place).query.parts[-1] for place in range(3)] == [Text(f"text {n}") for n in (0, 2, 4)]
    excluded.write_text("nobody\n")
    words = ["shards", "build", str(listing), str(tmp_path / "none"), "--source", "mine", "--instruction", "Find it."]
    with pytest.raises(SystemExit):
        main([*words, "--exclude", str(excluded)])
    assert "no row has an id of" in capsys.readouterr().err
    for bad in ('{"name": 1}', '{"id": 3}', "{"):
        excluded.write_text(bad)
        with pytest.raises(InputError, match="line 1"):
            read_exclusions(excluded)
    with pytest.raises(InputError, match="cannot be read"):
        read_exclusions(tmp_path / "nowhere")


# ------------------------------------------------------------------------------------------------ the page, the command


@pytest.fixture(scope="module")
def page(world: World, benchmark: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "audit.html"
    config = world.folder / "judge.yaml"
    config.write_text(yaml.safe_dump({"judge": {"kind": "oracle", "truth": str(world.truth)}}))
    words = ["--uvrb", benchmark, "--html", path, "--config", config, "--sample", "150"]
    assert command("audit", world.out("0.1"), *words) == 0
    return path


def test_the_page_stands_alone(page: Path, world: World) -> None:
    """No address but data and anchors, ids unique, words of users escaped, 24 samples with pictures and claims."""
    text = page.read_text()
    links = Links()
    links.feed(text)
    assert [load for load in links.loads if not load.startswith(("#", "data:"))] == []
    assert len(links.ids) == len(set(links.ids))
    assert {load[1:] for load in links.loads if load.startswith("#")} <= set(links.ids)
    assert "script" not in links.tags
    assert "&lt;script&gt;alert(" in text
    assert text.count('<div class="sample">') == 24
    assert text.count('<div class="picture') >= 24
    assert page.stat().st_size < 4 << 20
    assert list(page.parent.iterdir()) == [page]
    report = json.loads((world.out("0.1") / "audit" / "audit.json").read_text())
    rows = report["judge"]["all"]
    assert f"Of {rows['decided']:,} that could be decided, {rows['false']:,} are false" in " ".join(text.split())
    assert text.count('<li class="false">') > 5
    assert report["tasks"]["T2V"] == {"asked": CLIPS, "made": CLIPS, "written": CLIPS}
    assert report["tasks"]["T2I"]["asked"] == math.floor(CLIPS * TASKS["T2I"] + 0.5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["NOWHERE"], "holds no synthesis run"),
        (["RUN", "--judge", "embedded"], "cannot judge"),
        (["RUN", "--judge", "nobody"], "judge kind 'nobody'"),
        (["RUN", "--judge", "oracle"], "lacks the key 'truth'"),
        (["RUN", "--judge", "oracle", "truth"], "write key=value"),
        (["RUN", "--judge", "oracle", "truth=x", "--config", "x.yaml"], "not both"),
        (["RUN", "--config", "CONFIG"], "no section `judge`"),
        (["RUN", "--judge", "oracle", "truth=NOWHERE"], "holds no truth"),
        (["RUN", "--uvrb", "NOWHERE"], "no UVRB folder"),
        (["RUN", "--exclude", "x.jsonl"], "--uvrb"),
        (["RUN", "--sample", "0"], "sample 0"),
        (["RUN", "--ngram", "1", "--uvrb", "NOWHERE"], "n-grams of 1"),
    ],
)
def test_bad_input_is_one_line(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    places = {"RUN": str(world.out("0.3")), "NOWHERE": str(tmp_path / "nowhere"), "CONFIG": str(world.config)}
    own = [places.get(word, word.replace("NOWHERE", places["NOWHERE"])) for word in words]
    assert command("audit", *own) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1


@pytest.mark.slow
def test_the_embedded_captioners_errors_are_measured(world: World, tmp_path: Path) -> None:
    """The tiny base sees pixels and errs: its share of false claims by the checker lies in the sample's interval."""
    values = read_config(world.config)
    values["captioner"] = {"kind": "embedded"}
    out = tmp_path / "embedded"
    run(make_plan(values, out, captioners=CAPTIONERS, until="enrich"), "enrich")
    found = audit(out, AuditOptions(sample=80), world.oracle).report["judge"]["all"]
    own = dataclasses.replace(world, folder=tmp_path)
    share = own.false_share("embedded")
    print(f"embedded: {share:.3f} false by the checker; audit {found}")
    assert found["low"] <= share <= found["high"]
    assert share > 0.05  # it is no oracle


def test_a_browser_is_content(page: Path, browser: Any) -> None:
    """Last, since the browser's loop stays open. At 1280 px: no error, no request, no sideways scroll; all is there."""
    view = browser.new_page(viewport={"width": 1280, "height": 900})
    said, asked = [], []
    view.on("console", lambda message: said.append(message.text))
    view.on("pageerror", lambda error: said.append(str(error)))
    view.on("request", lambda request: asked.append(request.url))
    view.goto(page.as_uri(), wait_until="load")
    assert view.evaluate("document.documentElement.scrollWidth") <= 1280
    for table in view.query_selector_all(".wide"):
        assert table.evaluate("part => part.scrollWidth <= part.clientWidth + 1"), table.inner_text()[:60]
    for section in ("funnel", "captions", "tasks", "truth", "contamination", "samples"):
        assert view.locator(f"section#{section}").is_visible(), section
    assert view.locator("svg.chart").count() == 10
    shown = "getComputedStyle(document.querySelector('.picture')).backgroundImage"
    assert view.evaluate(shown).startswith('url("data:image/jpeg')
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    view.close()
