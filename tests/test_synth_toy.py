"""The whole synthesis as its toy configuration runs it, to shards that `gve fit` trains on; and on real videos."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from gve.cli import main
from gve.data.manifest import Manifest
from gve.data.sources import open_sources
from gve.synth.extend import TASKS
from gve.synth.folder import StepFolder
from gve.synth_cli import main as synth
from gve.toy.base import copy_base
from gve.toy.faults import FAULTS, PileRequest, make_pile, read_faults
from gve.toy.flips import Told
from gve.toy.truth import Truth

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "synth" / "toy.yaml"
SOUND = (
    "rabbit320.mp4",
    "frog.webm",
    "bulk-water.mov",
    "h265_video.mp4",
    "asl_book.mkv",
    "bear-vp9-odd-dimensions.webm",
)


def add_up(out: Path, rows: int) -> dict[str, Any]:
    """The funnel of a run, after checking that it adds up from the input on."""
    steps = json.loads((out / "funnel.json").read_text())["steps"]
    flow = rows
    for step in steps:
        assert step["in"] == flow == step["out"] + sum(step["rejected"].values()), step
        assert step["parts"]["tried"] == step["parts"]["made"] + sum(step["parts"]["rejected"].values())
        flow = step["rows"]
    return {step["step"]: step for step in steps}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_faulty_clips_become_shards_that_train(tmp_path: Path) -> None:
    """All seven tasks from 28 good clips among 60; the tiny base errs, and three steps of training change the loss."""
    pile = make_pile(tmp_path / "pile", PileRequest(rows=60, share=0.5), progress=False)
    copy_base(tmp_path / "base")
    out = tmp_path / "out"
    changes = [f"input.sources=[{{path: {pile}/weak.jsonl, name: toy}}]", f"encoder.model={tmp_path}/base"]
    assert synth(["run", "--config", str(CONFIG), "--out", str(out), "--set", *changes, "--workers", "1"]) == 0
    steps = add_up(out, 60)
    truth = {f"toy:{row['id']}": row["fault"] for row in read_faults(pile)}
    assert Counter(truth.values()) == {"": 60 - 2 * len(FAULTS), **dict.fromkeys(FAULTS, 2)}
    rejected = {json.loads(line)["id"] for line in (out / "rejects.jsonl").read_text().splitlines()}
    stayed = Counter(fault for id, fault in truth.items() if id not in rejected)
    assert stayed[""] >= 24
    assert stayed["wrong-caption"] == 2  # nobody looks for them here
    assert stayed["repeated"] == 2  # two rows repeat no more than the rule allows
    assert stayed.total() - stayed[""] <= 9

    sources = Manifest.load(out / "shards").sources
    assert {source.task for source in sources.values()} == set(TASKS)
    assert min(source.count for source in sources.values()) >= 20
    scenes = Truth.read(pile / "scenes.jsonl")
    told = [
        Told.read(pair["query"][0]["text"], scenes.of(video))
        for pair, video in text_to_video(out)
        if video.content_hash() in scenes.clips
    ]
    made, false = sum(one.made for one in told), sum(len(one.false) for one in told)
    assert made > 40
    assert 0.02 < false / made < 0.9  # it sees pixels, and errs

    recipe = {
        "trainer": {"default_root_dir": str(tmp_path / "run"), "max_epochs": 1, "enable_progress_bar": False},
        "model": {"base": str(tmp_path / "base"), "optimizer": {"lr": 0.003}},
        "data": {"root": str(out / "shards"), "steps_per_epoch": 3, "batch_size": 8, "dev_pairs": 4, "num_workers": 0},
        "record": {"steps": True},
    }
    recipe["data"] |= {"curriculum": {"schedule": "uniform", "unit": "task"}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    quickstart = CONFIG.parent.parent / "quickstart.yaml"
    words = ["fit", "--config", str(quickstart), "--config", str(tmp_path / "recipe.yaml"), "--uvrb.root", "null"]
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["attempts"][-1]["step"] == 3
    assert steps["output"]["out"] == sum(source.count for source in sources.values())


def text_to_video(out: Path) -> list[tuple[dict[str, Any], Any]]:
    """Pairs of T2V that a run made, each with its video."""
    from gve.synth.media import MediaStore

    media = MediaStore(out)
    pairs = [pair for outcome in StepFolder(out, "extend").outcomes() for pair in outcome.rows]
    return [(pair, media.video(pair["target"][0]["video"])) for pair in pairs if pair["task"] == "T2V"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_real_videos_run_to_the_end(real: Path, tmp_path: Path) -> None:
    """Any codec and size; the tiny base tells of coloured shapes that are not there, but always in the schema."""
    listed = [
        {"id": name, "video": str(real / "videos" / "good" / name), "caption": f"a short clip called {name} number {i}"}
        for i, name in enumerate(SOUND)
    ]
    listed.append({"id": "bad", "video": str(real / "videos" / "corrupt" / "corrupted.mp4"), "caption": "a bad one"})
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, listed)))
    copy_base(tmp_path / "base")
    out = tmp_path / "out"
    changes = [f"input.sources=[{{path: {tmp_path}/list.jsonl, name: real}}]", f"encoder.model={tmp_path}/base"]
    changes += ["select.rules=[]", "extend.text_only_k=0", "output.presample_px=28224"]
    assert synth(["run", "--config", str(CONFIG), "--out", str(out), "--set", *changes, "--workers", "1"]) == 0
    steps = add_up(out, len(listed))
    assert steps["scan"]["out"] == steps["enrich"]["out"] == len(SOUND)
    # Texts may break a word rule; no reply breaks its schema.
    assert set(steps["enrich"]["parts"]["rejected"]) <= {"no-keywords", "repeated", "few-words", "boilerplate"}
    for outcome in StepFolder(out, "enrich").outcomes():
        (row,) = outcome.rows
        assert 1 <= len(row["enrichment"]["captions"]) <= 5
        assert all(caption["text"].strip() and caption["words"] > 0 for caption in row["enrichment"]["captions"])
    read = 0
    for source in open_sources(out / "shards").values():
        for row in range(len(source)):
            assert source.read(row).query.parts
            read += 1
    assert read == steps["output"]["out"] >= 5 * len(SOUND)
