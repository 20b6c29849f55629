"""The end of the synthesis: shards that the trainer reads, and a card that says how they came to be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from gve.cli import main
from gve.data.build import check
from gve.data.manifest import Manifest
from gve.data.mixture import mixture
from gve.data.sources import open_sources
from gve.items import Frames, InputError
from gve.synth.card import card
from gve.synth.config import build, make_plan, read_config
from gve.synth.crew import run
from gve.synth.media import MediaStore
from gve.synth.output import Output, OutputOptions
from gve.synth.status import Watch
from gve.synth.units import Outcome, Row
from gve.synth_cli import CAPTIONERS
from test_synth_inputs import context, mp4

CLIPS = 12  # of which 1 2 3 4 6 8 9 11 12 pass the test stages, and 3 gets no caption


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration of the test stages (synth_stages.py) over real clips, outputs included."""
    folder = tmp_path_factory.mktemp("output")
    rows = []
    for i in range(1, CLIPS + 1):
        (folder / f"{i}.mp4").write_bytes(mp4(count=2 + i))
        rows.append({"id": str(i), "video": f"{i}.mp4", "caption": f"clip {i}"})
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {"path": str(folder / "list.jsonl"), "name": "web", "licence": "cc-by-4.0"}
    sections = {
        "seed": 3,
        "input": {"sources": [source]},
        "captioner": {"kind": "synth_stages:Echo"},
        "run": {"unit_rows": 5, "poll_s": 0.05},
        **{
            name: {"class": f"synth_stages:{cls}"}
            for name, cls in (("scan", "Mark"), ("select", "Pick"), ("enrich", "Tell"), ("extend", "Pairs"))
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def shards(out: Path) -> dict[str, bytes]:
    """Tars, combined indexes and the manifest; the small .idx files hold their metadata in any order."""
    found = [path for path in sorted((out / "shards").rglob("*")) if path.suffix in (".tar", ".npy", ".json")]
    return {str(path.relative_to(out)): path.read_bytes() for path in found}


@pytest.fixture(scope="module")
def made(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "uvrd-small"
    run(make_plan(read_config(config), out, captioners=CAPTIONERS))
    return out


def test_shards_hold_every_pair_with_its_provenance(made: Path, config: Path) -> None:
    """By hand: 9 clips pass, 3 has no caption; 8 first texts, 7 second ones (9 keeps one), 7 text pairs."""
    assert check(made / "shards") == []
    sources = open_sources(made / "shards")
    assert {name: len(source) for name, source in sources.items()} == {"uvrd_t2t": 7, "uvrd_t2v": 15}
    assert sources["uvrd_t2v"].record.instruction == mixture()["uvrd_t2v"].instruction
    first = sources["uvrd_t2v"].read(0)
    assert first.query.text == "What is seen? short clip 1 good"
    assert first.target.media[0].source == (config.parent / "1.mp4").read_bytes()
    record = json.loads(sources["uvrd_t2v"].members(0)["json"])
    assert record["provenance"] == {
        "id": "t2v:web:1:0",
        "of": ["web:1"],
        "stage": "extend",
        "prompt": "p1",
        "model": "m1",
    }
    assert Watch(made).look()["finished"]
    numbers = json.loads((made / "funnel.json").read_text())
    assert numbers["steps"][-1] == numbers["steps"][-1] | {"step": "output", "in": 22, "out": 22, "rejected": {}}
    written = [json.loads(line)["rows"][0] for line in (made / "output/00000.jsonl").read_text().splitlines()]
    assert {row["key"] for row in written} == {source.key(i) for source in sources.values() for i in range(len(source))}


def test_the_card_states_what_was_made(made: Path) -> None:
    text = (made / "shards/README.md").read_text()
    _, head, body = text.split("---\n", 2)
    front = yaml.safe_load(head)
    assert front["license"] == "cc-by-4.0"
    assert front["size_categories"] == ["n<1K"]
    assert "22 training pairs in 2 tasks, made from 12 weakly captioned videos" in body
    for row in (
        "| uvrd_t2v | T2V | 2 | 15 |",
        "| web | cc-by-4.0 |",
        "| scan | 12 | 10 | 2 multiple | 10 |",
        "| enrich | 9 | 8 | 1 no-caption | 8 |",
        "| enrich | 18 | 15 | 1 no json, 1 not-used, 1 words |",
        "| all | seed | 3 |",
        "| enrich | captioner | echo-1 |",
    ):
        assert row in body, row
    prompt = json.loads((made / "enrich/identity.json").read_text())["fingerprint"]["prompts"]["tell"]
    assert prompt in body
    assert str(made.parent) not in text  # where it was made is nobody's business


def test_cells_of_the_card_cannot_break_its_tables(made: Path, config: Path) -> None:
    plan = make_plan(
        read_config(config, ["input.sources=[{path: x, name: web, licence: 'a | b'}]"]), made, captioners={}
    )
    numbers = json.loads((made / "funnel.json").read_text())
    assert "| web | a \\| b |" in card(plan, numbers)


def test_shards_do_not_know_how_the_work_was_cut(made: Path, config: Path, tmp_path: Path) -> None:
    plan = make_plan(read_config(config, ["run.unit_rows=2", "output.jobs=1"]), tmp_path / "out", captioners=CAPTIONERS)
    run(plan)
    assert shards(tmp_path / "out") == shards(made)


def test_an_exclusion_list_is_obeyed_and_the_rest_need_not_be_made_again(
    made: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ids of weak pairs take all their pairs with them, ids of pairs only themselves: 3 of clip 1, 1 of clip 2."""
    out, listed = tmp_path / "out", tmp_path / "exclude.txt"
    listed.write_text("web:1\n\nt2t:web:2\n")
    words = ["synth", "run", "--config", str(config), "--out", str(out), "--json"]
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 0
    asked = (out / "enrich/00000.json").stat().st_mtime_ns
    with pytest.raises(SystemExit) as end:
        main([*words, "--set", f"output.exclude={listed}"])
    assert end.value.code == 2
    assert "--redo output" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main([*words, "--set", f"output.exclude={listed}", "output.prefix=mine", "--redo", "output"])
    assert end.value.code == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["steps"][-1]["rejected"] == {"contaminated": 4}
    assert {name: len(source) for name, source in open_sources(out / "shards").items()} == {
        "mine_t2t": 5,
        "mine_t2v": 13,
    }
    assert (out / "enrich/00000.json").stat().st_mtime_ns == asked


def written(tmp_path: Path, rows: list[Row], **options: Any) -> list[Outcome]:
    output = Output(build(OutputOptions, options, "output"), context(tmp_path))
    return list(output.run(rows))


def pair_row(tmp_path: Path, name: str, **changes: Any) -> Row:
    path = tmp_path / f"{name}.mp4"
    if not path.exists():
        path.write_bytes(mp4(6, 64))
    row = {"id": name, "task": "T2V", "of": [name], "query": [{"text": f"text {name}"}]}
    return row | {"target": [{"video": {"file": str(path)}}]} | changes


def test_stored_frames(tmp_path: Path) -> None:
    found = written(tmp_path, [pair_row(tmp_path, "a")], presample="uniform(4)", presample_px=32 * 32)
    assert found[0].rows[0]["key"] == "uvrd_t2v_000000_0000"
    record = Manifest.load(tmp_path / "shards").sources["uvrd_t2v"]
    assert str(record.presample.sampling if record.presample else "") == "uniform(4)"
    frames = open_sources(tmp_path / "shards")["uvrd_t2v"].read(0).target.media[0].source
    assert isinstance(frames, Frames)
    assert frames.pixels.shape == (4, 32, 32, 3)
    assert frames.num_frames == 6
    np.testing.assert_array_equal(frames.indices, [0, 2, 3, 5])


def test_pairs_of_pictures_and_clips_that_the_run_cut(tmp_path: Path) -> None:
    """A composed pair: locators of the run's own media, and a hard negative."""
    from PIL import Image

    store = MediaStore(tmp_path)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "r.png")
    picture, clip = store.put((tmp_path / "r.png").read_bytes(), ".png"), store.put(mp4(3), ".mp4")
    assert store.put((tmp_path / "r.png").read_bytes(), ".png") == picture
    row = pair_row(
        tmp_path,
        "c",
        task="TI2V",
        query=[{"image": picture}, {"text": "now it is blue"}],
        negatives=[[{"video": clip}]],
    )
    written(tmp_path, [row], prefix="mine", instructions={"TI2V": "Find it."})
    read = open_sources(tmp_path / "shards")["mine_ti2v"].read(0)
    assert (read.query.modality, read.query.instruction, read.query.text) == ("TI", "Find it.", "now it is blue")
    assert read.query.media[0].content_hash() == picture["sha256"]
    assert read.negatives[0].media[0].source == mp4(3)


def test_pairs_that_cannot_be_written_say_why(tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"nothing")
    rows = [
        pair_row(tmp_path, "good"),
        pair_row(tmp_path, "gone", target=[{"video": {"file": str(tmp_path / "none.mp4")}}]),
        pair_row(tmp_path, "broken"),
        pair_row(tmp_path, "words", task="T2T"),
        pair_row(tmp_path, "half", query=[{"text": "\ud83d"}]),
    ]
    found = written(tmp_path, rows, presample="uniform(2)")
    assert [outcome.id for outcome in found] == [row["id"] for row in rows]
    assert [outcome.rejects[0].reason if outcome.rejects else "" for outcome in found] == [
        *("", "missing", "not-a-video", "pair", "pair")
    ]
    for outcome in found:
        outcome.check()


def test_nothing_is_written_when_no_pair_is_left(tmp_path: Path) -> None:
    row = pair_row(tmp_path, "gone", target=[{"video": {"file": str(tmp_path / "none.mp4")}}])
    with pytest.raises(InputError, match=r"no pair is left to write \(1 missing\)"):
        written(tmp_path, [row])
    with pytest.raises(InputError, match=r"exclusion list .* cannot be read"):
        written(tmp_path, [row], exclude=str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="task T2X"):
        written(tmp_path, [pair_row(tmp_path, "a", task="T2X")])
    assert not (tmp_path / "shards").exists()


def test_a_killed_output_is_written_anew(made: Path, config: Path, tmp_path: Path) -> None:
    """The shards were published, but not the step: it is done again, over them."""
    out = tmp_path / "out"
    plan = make_plan(read_config(config), out, captioners=CAPTIONERS)
    run(plan)
    for name in ("done.json", "00000.json", "00000.jsonl"):
        (out / "output" / name).unlink()
    run(plan)
    assert shards(out) == shards(made)
    assert check(out / "shards") == []


def test_the_shards_are_ready_for_fit(made: Path, recipe: Path, tmp_path: Path) -> None:
    """`gve fit` trains on them as they are."""
    settings = yaml.safe_load(recipe.read_text())
    settings["data"] |= {"root": str(made / "shards"), "batch_size": 2, "negatives": 0, "dev_pairs": 2}
    settings["data"] |= {"steps_per_epoch": 2, "curriculum": {"schedule": "uniform"}}
    settings["trainer"] |= {"max_epochs": 1, "default_root_dir": str(tmp_path), "limit_val_batches": 0}
    path = tmp_path / "fit.yaml"
    path.write_text(yaml.safe_dump(settings))
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", str(path)])
    assert end.value.code in (0, None)
