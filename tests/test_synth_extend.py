"""Stage 3 of the synthesis: pairs of seven tasks in their proportions, and composed queries that need their reference.

The stages at the end of this file are named in configurations as `class: test_synth_extend:Cut`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import yaml

from gve.data.manifest import Manifest
from gve.encode.encoder import Encoded
from gve.items import InputError, Item
from gve.synth.config import make_plan, read_config
from gve.synth.crew import run
from gve.synth.enrich import ASK
from gve.synth.extend import TASKS, Extend, ExtendOptions, targets
from gve.synth.folder import StepFolder
from gve.synth.media import MediaStore
from gve.synth.units import Context, Outcome, Row
from gve.synth_cli import CAPTIONERS
from gve.toy.base import random_twin
from gve.toy.families import Maker
from gve.toy.lessons import random_scene
from gve.toy.render import Shot, render
from gve.toy.truth import Truth
from gve.video import Sampling, decode, encode_jpeg

STYLES = ("concise", "spatio-temporal rich", "abstract", "keywords only", "partially relevant")


def told(text: str, style: str = "query") -> dict[str, Any]:
    return {"text": text, "style": style, "words": len(text.split()), "cues": {}, "prompt": f"sha of {style}"}


def enriched(folder: Path, name: str, **composed: str) -> Row:
    """A video with all that pairs are made of; `composed` are texts by task."""
    (folder / f"{name}.mp4").write_bytes(name.encode())
    enrichment: dict[str, Any] = {
        "profile": "temporal",
        "captions": [told(f"{name} {style}", style) for style in STYLES],
        "frame": {"image": {"made": f"{name}.jpg"}, "captions": [told(f"{name} still", "concise")]},
        "composed": {
            task: {"reference": {"made": f"{name}.{task}"}, "strategy": "new scene", **told(text)}
            for task, text in composed.items()
        },
    }
    row = {"id": name, "source": "web", "video": {"file": str(folder / f"{name}.mp4")}, "caption": "", "meta": {}}
    cut = {"frames": [{"made": f"{name}.jpg"}], "clips": [{"made": f"{name}.part"}]}
    return {**row, **cut, "start_s": None, "end_s": None, "enrichment": enrichment}


class Table:
    """An Encoder whose vectors are written down: by text, and by the name of the video file."""

    dim, fingerprint, weights_hash, inputs = 2, "table", "table", {}

    def __init__(self, angles: Mapping[str, float]) -> None:
        self.angles = angles
        self.fingerprint = hashlib.sha256(repr(angles).encode()).hexdigest()
        self.queries: list[Item] = []

    def encode(self, items: Sequence[Item], *, transform: object = None, progress: str = "") -> Encoded:
        self.queries += [item for item in items if item.text]
        names = [item.text or Path(item.media[0].name).stem for item in items]
        degrees = np.array([self.angles[name] for name in names])
        vectors = np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], 1).astype(np.float32)
        return Encoded(vectors, dict.fromkeys(np.flatnonzero(np.isnan(degrees)).tolist(), "broken"))


def extend(folder: Path, rows: Sequence[Row], encoder: Any = None, seed: int = 0, **options: Any) -> list[Outcome]:
    """The outcomes; they add up, and there is one for each row."""

    def load() -> Any:
        assert encoder, "nothing is to be measured"
        return encoder

    stage = Extend(ExtendOptions(**options), Context(MediaStore(folder), seed, load, lambda step: ()))
    outcomes = list(stage.run(rows))
    for outcome in outcomes:
        outcome.check()
    assert [outcome.id for outcome in outcomes] == [row["id"] for row in rows]
    return outcomes


def counts(outcomes: Iterable[Outcome]) -> dict[str, int]:
    return dict(Counter(pair["task"] for outcome in outcomes for pair in outcome.rows))


# ------------------------------------------------------------------------------------------------------ proportions


def test_proportions_are_the_published_ones() -> None:
    """UVRD of gve.md section 5, in thousands."""
    uvrd = {"T2V": 879, "T2I": 210, "I2V": 200, "T2T": 100, "TI2V": 89, "V2V": 36, "TV2V": 35}
    assert {task: pytest.approx(count / 879) for task, count in uvrd.items()} == TASKS
    assert targets(TASKS, 879_000) == {task: count * 1000 for task, count in uvrd.items()}
    assert targets({"T2V": 1.0, "T2T": 0.25}, 10) == {"T2V": 10, "T2T": 3}
    # What is asked for leaves room for what is refused.
    assert all(1.4 * TASKS[task] < share < 1.6 * TASKS[task] for task, share in ASK.items())


def test_a_run_has_its_proportions_exactly(tmp_path: Path) -> None:
    rows = [enriched(tmp_path, f"v{i}", TI2V="this, asleep", TV2V="the same later") for i in range(200)]
    outcomes = extend(tmp_path, rows, text_only_k=0)
    # By hand, 200 x count / 879, rounded.
    assert counts(outcomes) == {"T2V": 200, "T2I": 48, "I2V": 46, "T2T": 23, "TI2V": 20, "V2V": 8, "TV2V": 8}
    over = Counter(reject.id.split(":")[0] for outcome in outcomes for reject in outcome.rejects)
    assert over == {"t2i": 152, "ti2v": 180, "tv2v": 192}  # texts that were written and are not needed
    assert {reject.reason for outcome in outcomes for reject in outcome.rejects} == {"over-target"}
    again = extend(tmp_path, rows[::-1], text_only_k=0)[::-1]
    assert again == outcomes  # which videos give what depends on their ids alone
    assert extend(tmp_path, rows, text_only_k=0, seed=1) != outcomes


def test_pairs_hold_what_their_task_says(tmp_path: Path) -> None:
    row = enriched(tmp_path, "v", TI2V="this, asleep", TV2V="the same later")
    (outcome,) = extend(tmp_path, [row], text_only_k=0, tasks=dict.fromkeys(TASKS, 1.0))
    pairs = {pair["task"]: pair for pair in outcome.rows}
    shapes = {
        task: (*(next(iter(part)) for part in pair["query"]), ">", *pair["target"][0]) for task, pair in pairs.items()
    }
    assert shapes == {
        "T2V": ("text", ">", "video"),
        "T2I": ("text", ">", "image"),
        "I2V": ("image", ">", "video"),
        "T2T": ("text", ">", "text"),
        "TI2V": ("image", "text", ">", "video"),
        "V2V": ("video", ">", "video"),
        "TV2V": ("video", "text", ">", "video"),
    }
    texts = [pairs["T2V"]["query"], pairs["T2T"]["query"], pairs["T2T"]["target"]]
    assert len({text[0]["text"] for text in texts}) == 3  # T2T takes two of the captions that T2V left
    for task in ("I2V", "V2V", "TI2V", "TV2V", "T2V"):
        assert pairs[task]["target"] == [{"video": row["video"]}]
    assert pairs["TV2V"]["query"] == [{"video": {"made": "v.TV2V"}}, {"text": "the same later"}]
    assert pairs["TI2V"]["provenance"] == {
        "source": "web",
        "stage": "extend",
        "profile": "temporal",
        "strategy": "new scene",
        "style": "query",
        "prompt": "sha of query",
        "model": "",
    }
    assert "prompt" not in pairs["V2V"]["provenance"]  # nothing was written for it
    assert len({pair["id"] for pair in outcome.rows}) == 7


def test_a_video_that_gives_nothing_is_dropped(tmp_path: Path) -> None:
    rows = [enriched(tmp_path, f"v{i}") for i in range(4)]
    outcomes = extend(tmp_path, rows, tasks={"V2V": 0.5})
    assert counts(outcomes) == {"V2V": 2}
    assert [reject.reason for outcome in outcomes for reject in outcome.rejects] == ["no-pair"] * 2


@pytest.mark.parametrize(
    "options", [{"tasks": {"V2T": 1.0}}, {"tasks": {"T2V": 1.1}}, {"text_only_k": 10, "pool_videos": 10}, {"batch": 0}]
)
def test_options_that_cannot_hold_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        ExtendOptions(**options)


# ------------------------------------------------------------------------------------ the reference must be needed


def measured(folder: Path, angles: Mapping[str, float], **options: Any) -> tuple[dict[str, tuple[str, Any]], Table]:
    """Refusals by pair id, of one composed query about v0 among the other videos."""
    videos = sorted(name for name in angles if name.startswith("v"))
    rows = [enriched(folder, name, **({"TI2V": "this, asleep"} if name == "v0" else {})) for name in videos]
    table = Table(angles)
    outcomes = extend(folder, rows, table, tasks={"T2V": 1.0, "TI2V": 1.0}, **options)
    assert counts(outcomes).get("TI2V", 0) + sum(r.id == "ti2v:v0" for o in outcomes for r in o.rejects) == 1
    found = {r.id: (r.reason, r.score) for o in outcomes for r in o.rejects if r.id.startswith("ti2v")}
    return found, table


# The text at 0 degrees, its own video v0 at 40; videos at 10, 20 and 30 are nearer to the text, the others are not.
CIRCLE = {"this, asleep": 0.0, "v0": 40.0, "v1": 10.0, "v2": -20.0, "v3": 30.0, "v4": 50.0, "v5": 90.0, "v6": 180.0}


@pytest.mark.parametrize(
    ("k", "pool", "refused"),
    [
        (4, 7, True),  # three are nearer: it is among the first four
        (3, 7, False),
        (80, 140, True),  # 80 of 140 are 4 of the 7 that there are
        (60, 140, False),
    ],
)
def test_a_text_that_finds_its_video_alone_is_refused(tmp_path: Path, k: int, pool: int, refused: bool) -> None:
    found, table = measured(tmp_path, CIRCLE, text_only_k=k, pool_videos=pool)
    assert found == ({"ti2v:v0": ("text-finds-it", 3.0)} if refused else {})
    assert {query.instruction for query in table.queries} == {
        "Find the video that matches the description, whatever its length and style."
    }


def test_the_first_is_refused_of_the_smallest_pool(tmp_path: Path) -> None:
    found, _ = measured(tmp_path, {"this, asleep": 0.0, "v0": 1.0, "v1": 2.0})
    assert found == {"ti2v:v0": ("text-finds-it", 0.0)}
    assert measured(tmp_path, {"this, asleep": 0.0, "v0": 1.0, "v1": 0.5})[0] == {}
    assert measured(tmp_path, {"this, asleep": 0.0, "v0": 1.0, "v1": 2.0}, text_only_k=0)[0] == {}


def test_a_video_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    found, _ = measured(tmp_path, {**CIRCLE, "v0": np.nan}, text_only_k=1, pool_videos=7)
    assert found == {"ti2v:v0": ("unreadable", None)}
    assert measured(tmp_path, {**CIRCLE, "v1": np.nan}, text_only_k=4, pool_videos=7)[0] == {
        "ti2v:v0": ("text-finds-it", 2.0)  # unread ones are in no pool: 4 of 7 are 3 of 6
    }


def test_an_interrupted_measurement_goes_on(tmp_path: Path) -> None:
    first = measured(tmp_path, CIRCLE, text_only_k=4, pool_videos=7)
    second = measured(tmp_path, CIRCLE, text_only_k=4, pool_videos=7, batch=2)
    assert second[0] == first[0]
    assert first[1].queries
    assert not second[1].queries  # kept in the run's folder


# ------------------------------------------------------------------------------------------------- the whole, small


@dataclass(frozen=True)
class NoOptions:
    pass


class Cut:
    """Two frames of each video, and its second half that lies beside it."""

    Options: ClassVar[type] = NoOptions
    scope: ClassVar[Any] = "unit"

    def __init__(self, options: NoOptions, context: Context) -> None:
        self.media = context.media

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        return {}

    def run(self, rows: Iterable[Row]) -> Iterator[Outcome]:
        for row in rows:
            path = Path(row["video"]["file"])
            pixels = decode(path, Sampling.uniform(2)).pixels
            frames = [self.media.put(encode_jpeg(picture), ".jpg") for picture in pixels]
            clips = [self.media.put(path.with_suffix(".part").read_bytes(), ".mp4")]
            yield Outcome(row["id"], ({**row, "frames": frames, "clips": clips},))


class Keep(Cut):
    """Rows as they are."""

    scope: ClassVar[Any] = "run"

    def run(self, rows: Iterable[Row]) -> Iterator[Outcome]:
        for row in rows:
            yield Outcome(row["id"], (row,))


def test_from_toy_clips_to_shards(tmp_path: Path) -> None:
    """Eight clips, the rule-based captioner, a random base that measures: every task comes out, with its provenance."""
    make, clips = Maker("extend"), {}
    for i in range(8):
        clip = (random_scene(make),)
        data = render(Shot(clip))
        (tmp_path / f"{i}.mp4").write_bytes(data)
        (tmp_path / f"{i}.part").write_bytes(render(Shot(clip, 16)))
        clips[hashlib.sha256(data).hexdigest()] = clip
    Truth(clips).write(tmp_path / "truth.jsonl")
    listed = [{"id": str(i), "video": f"{i}.mp4", "caption": "things"} for i in range(8)]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, listed)))
    random_twin(tmp_path / "base")
    everything = dict.fromkeys(TASKS, 1.0)
    sections = {
        "input": {"sources": [{"path": str(tmp_path / "list.jsonl"), "name": "web", "licence": "cc0-1.0"}]},
        "scan": {"class": "test_synth_extend:Cut"},
        "select": {"class": "test_synth_extend:Keep"},
        "enrich": {
            "ask": dict.fromkeys(ASK, 1.0),
            "words": {style: [1, 200] for style in STYLES},
            "frame_words": {"concise": [1, 200], "detailed": [1, 200]},
            "short_words": 0,
            "long_words": 0,
            "min_captions": 3,
            "boilerplate": False,
        },
        "extend": {"tasks": everything, "text_only_k": 1, "pool_videos": 8},
        "captioner": {"kind": "oracle", "truth": str(tmp_path / "truth.jsonl")},
        "encoder": {"model": str(tmp_path / "base"), "frames": "uniform(2)"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(sections))
    out = tmp_path / "out"
    run(make_plan(read_config(tmp_path / "config.yaml"), out, captioners=CAPTIONERS), "")
    funnel = {step["step"]: step for step in json.loads((out / "funnel.json").read_text())["steps"]}
    assert funnel["enrich"]["out"] == funnel["extend"]["out"] == 8
    parts = funnel["extend"]["parts"]
    assert parts["tried"] == parts["made"] + sum(parts["rejected"].values())
    assert set(parts["rejected"]) <= {"text-finds-it"}
    sources = Manifest.load(out / "shards").sources
    assert {record.task for record in sources.values()} == set(TASKS)
    for task in ("T2V", "I2V", "V2V", "T2I", "T2T"):
        assert sources[f"uvrd_{task.lower()}"].count == 8
    assert sum(record.count for record in sources.values()) == parts["made"]
    identity = StepFolder(out, "enrich").identity()
    assert identity is not None
    used = {name: text.split()[1] for name, text in identity.fingerprint["prompts"].items()}
    made = {pair["task"]: pair["provenance"] for pair in StepFolder(out, "extend").slices()[0].rows()}
    assert made["T2V"]["prompt"] == used["video_captions"]
    assert made["T2I"]["prompt"] == used["frame_captions"]
    assert made["T2V"]["model"] == identity.fingerprint["captioner"]
    assert made["T2V"]["model"].startswith("toy oracle")
