"""Own videos: what is split, what leaks, what is refused; the whole script on real files is slow."""

from __future__ import annotations

import asyncio
import csv
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from gve.cli import main
from gve.data.sources import open_sources
from gve.encode.encoder import Execution
from gve.encode.pretrained import load_encoder
from gve.eval.results import read_runs
from gve.eval.run import Setting
from gve.items import InputError, Item
from gve.own_videos.evaluation import evaluate_own, held_out_sets
from gve.own_videos.recipe import choose, write_recipe
from gve.own_videos.videos import OwnVideo, caption_of_name, prepare, read_split
from gve.synth.schemas import CHARS_PER_WORD
from gve.toy.base import EMBEDDED
from gve.toy.render import encode
from gve.video import Sampling
from synth_server import Seen, SynthServer, instance

ROOT = Path(__file__).resolve().parent.parent
HOSTILE = "a <script>alert(1)<script>\n\"red\" 'bud' ..mp4"


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Seven clips of a bar that moves over another shade each."""
    folder = tmp_path_factory.mktemp("clips")
    for number in range(7):
        shades = np.full((12, 84, 84, 3), 30 * number, np.uint8)
        for time, frame in enumerate(shades):
            frame[:, 6 * time : 6 * time + 12] = (230, 200, 60)
        (folder / f"{number}.mp4").write_bytes(encode(list(shades)))
    return sorted(folder.iterdir())


@pytest.fixture
def folder(clips: list[Path], tmp_path: Path) -> Path:
    """Six clips, a copy of the first under a name that sorts last, and what is no video."""
    folder = tmp_path / "mine"
    (folder / "below").mkdir(parents=True)
    names = ["a red ball rolls away.mp4", "IMG_0001.mp4", HOSTILE, "below/one.mp4", "below/two.mp4", "c.mp4"]
    for name, clip in zip(names, clips, strict=False):
        shutil.copy(clip, folder / name)
    shutil.copy(clips[0], folder / "zzz.mp4")
    (folder / "notes.txt").write_text("no video")
    (folder / "cut.mp4").write_bytes(clips[1].read_bytes()[:400])
    return folder


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("a_red-bud opens_slowly_2.mp4", "a red bud opens slowly"),
        ("A dog's tail wags.mov", "A dog's tail wags"),
        ("une fille ouvre la fenêtre.webm", "une fille ouvre la fenêtre"),
        ("IMG_0042.mov", ""),
        ("big_buck_bunny_0_30.webm", ""),  # three words
        ("talk_720p_final_version_a.mp4", ""),  # a number inside
        ("2024-05-01 12.30.11 my own film.mp4", ""),
        ("....mp4", ""),
    ],
)
def test_names_that_read_as_captions(name: str, caption: str) -> None:
    assert caption_of_name(f"/somewhere/4 words that are a folder/{name}") == caption


def test_a_folder_is_checked_and_split_by_content(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    split = prepare(folder, out, test_share=0.34, seed=1, progress=False)
    assert len(split.videos) == 6
    assert len(split.of(test=True)) == 2  # round(0.34 * 6)
    assert split.facts["duplicates"] == 1
    assert sorted(Path(name).name for name in split.rejected) == ["cut.mp4", "notes.txt"]
    assert {video.captions for video in split.videos} == {(), ("a red ball rolls away",)}
    # No file of the training list has the bytes of a held-out one; a split by file would put the copy on both sides.
    rows = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    trained = {Path(row["target"]["video"]).read_bytes() for row in rows}
    assert not trained & {Path(video.path).read_bytes() for video in split.of(test=True)}
    assert sum(row["source"] == "own_i2v" for row in rows) == 4
    with open(out / "train.csv", newline="") as file:
        weak = list(csv.DictReader(file))
    assert {row["video"] for row in weak} == {video.path for video in split.of(test=False)}
    # Names decide nothing: the same bytes elsewhere are split alike. Another seed splits otherwise.
    (tmp_path / "other").mkdir()
    for number, video in enumerate(split.videos):
        shutil.copy(video.path, tmp_path / "other" / f"{number}.mp4")
    again = prepare(tmp_path / "other", tmp_path / "o2", test_share=0.34, seed=1, progress=False)
    assert [video.test for video in again.videos] == [video.test for video in split.videos]
    sides = {
        tuple(v.test for v in prepare(tmp_path / "other", tmp_path / f"s{s}", test_share=0.34, seed=s).videos)
        for s in (2, 3)
    }
    assert sides != {tuple(video.test for video in split.videos)}


def test_the_same_call_goes_on_and_another_is_refused(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = prepare(folder, out, test_share=0.34, seed=1, progress=False)
    before = (out / "split.json").stat().st_mtime_ns
    assert prepare(folder, out, test_share=0.34, seed=1, progress=False) == first == read_split(out)
    assert (out / "split.json").stat().st_mtime_ns == before
    for wrong in ({"seed": 2, "test_share": 0.34}, {"seed": 1, "test_share": 0.5}):
        with pytest.raises(InputError, match="made from other videos, captions or settings"):
            prepare(folder, out, progress=False, **wrong)  # type: ignore[arg-type]
    (folder / "c.mp4").unlink()
    with pytest.raises(InputError, match="made from other videos"):
        prepare(folder, out, test_share=0.34, seed=1, progress=False)


def test_a_csv_gives_captions(clips: list[Path], tmp_path: Path) -> None:
    listing = tmp_path / "mine.csv"
    rows = [[clip.name, f"clip {number}"] for number, clip in enumerate(clips[:4])]
    rows += [[clips[0].name, "another caption,  with a comma"], [clips[0].name, "clip 0"], [clips[1].name, ""]]
    for clip in clips[:4]:
        shutil.copy(clip, tmp_path)
    with open(listing, "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["file", "caption"], *rows, ["gone.mp4", "no such file"]])
    split = prepare(listing, tmp_path / "out", test_share=0.5, seed=0, progress=False)
    captions = {Path(video.path).name: video.captions for video in split.videos}
    assert captions[clips[0].name] == ("clip 0", "another caption, with a comma")
    assert captions[clips[1].name] == ("clip 1",)
    assert [Path(name).name for name in split.rejected] == ["gone.mp4"]


def test_too_few_videos_and_bad_sources_are_refused(clips: list[Path], tmp_path: Path) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for number in range(5):
        shutil.copy(clips[min(number, 2)], few / f"{number}.mp4")  # three contents in five files
    with pytest.raises(InputError, match=r"^3 different videos of 5 files can be used, 4 are needed"):
        prepare(few, tmp_path / "out", test_share=0.2, seed=0, progress=False)
    assert not (tmp_path / "out" / "split.json").exists()
    (tmp_path / "bad.csv").write_text("clip_name,words\na,b\n")
    with pytest.raises(InputError, match="has no column video or path or file: clip_name, words"):
        prepare(tmp_path / "bad.csv", tmp_path / "out", test_share=0.2, seed=0)
    (tmp_path / "bytes.csv").write_bytes(b"video,caption\n\xff\xfe,a\n")
    with pytest.raises(InputError, match="is no csv in UTF-8"):
        prepare(tmp_path / "bytes.csv", tmp_path / "out", test_share=0.2, seed=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no files"):
        prepare(tmp_path / "empty", tmp_path / "out", test_share=0.2, seed=0)
    with pytest.raises(InputError, match="between 0 and 1"):
        prepare(few, tmp_path / "out", test_share=1.0, seed=0)


def test_held_out_sets_and_their_scores(clips: list[Path], tmp_path: Path) -> None:
    """Two videos share a caption but for case: one query, two answers. The score is that of a ranking by hand."""
    frame = tmp_path / "frame.jpg"
    videos = []
    for number, (clip, captions) in enumerate(zip(clips, [("A ball",), ("a ball", "a cube"), ()], strict=False)):
        split = OwnVideo(str(clip), f"{number:064x}", captions, str(frame), True)
        videos.append(split)
    text, image = held_out_sets(videos[:3])
    assert (text.record.name, text.record.metric, image.record.name) == ("own-T2V", "recall_at_1", "own-I2V")
    assert text.positives == ((0, 1), (1,))
    assert len(image.queries) == 1  # one frame for all: the last video owns it
    from gve.eval.builders.i2v import cut_frame

    for number, video in enumerate(videos):
        cut_frame(Path(video.path), tmp_path / f"{number}.jpg", 0)
        videos[number] = OwnVideo(video.path, video.sha256, video.captions, str(tmp_path / f"{number}.jpg"), True)
    run = evaluate_own(videos, str(EMBEDDED), tmp_path / "run", Setting(8, 9), Execution())
    inputs = {"sampling": Sampling.uniform(8), "max_frame_tokens": 9, "max_image_tokens": 9, "max_length": 8192}
    encoder = load_encoder(str(EMBEDDED), inputs=inputs)
    corpus = encoder.encode([Item.of(video=video.path) for video in videos]).vectors
    for tested in held_out_sets(videos):
        ranked = encoder.encode(tested.queries).vectors @ corpus.T
        hits = [int(np.argmax(row)) in own for row, own in zip(ranked, tested.positives, strict=True)]
        assert run.results.data["sets"][tested.record.name]["value"] == pytest.approx(np.mean(hits))
    (saved,) = read_runs(tmp_path / "run")
    assert set(saved.sets) == {"own-T2V", "own-I2V"}
    assert [tested.record.name for tested in held_out_sets([videos[2], videos[2]])] == ["own-I2V"]


def test_the_recipe_fits_the_pairs_and_the_machine(folder: Path, tmp_path: Path) -> None:
    """Four frames of four videos and at most one caption, 10 passes in three epochs of ceil(10 * pairs / batch / 3)."""
    out = tmp_path / "out"
    prepare(folder, out, test_share=0.34, seed=1, progress=False)
    words = ["shards", "build", out / "train.jsonl", out / "shards", "--presample", "uniform(8)"]
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    assert end.value.code == 0
    recipe = choose("toy", EMBEDDED)
    assert (recipe.config, recipe.tokens, recipe.device) == ("configs/quickstart.yaml", 9, "cpu")
    told = write_recipe(out, out / "shards", recipe, passes=10, seed=3)
    assert told["batch"] == 4
    assert told["steps_per_epoch"] == -(-10 * told["pairs"] // 12)
    values = yaml.safe_load((out / "recipe.yaml").read_text())
    assert values["data"]["root"] == str(out / "shards")
    assert values["data"]["dev_pairs"] == 0
    # Four frames to find four clips; a single caption has nothing to be told from and is left out.
    sizes = {name: sum(source.shard_sizes) for name, source in open_sources(str(out / "shards")).items()}
    assert values["data"]["batch_size"] == {name: size if size > 1 else 0 for name, size in sizes.items()}
    with pytest.raises(InputError, match="--passes 0"):
        write_recipe(out, out / "shards", recipe, passes=0, seed=3)
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="needs a GPU of 20 GiB or more, there is none"):
            choose("Qwen/Qwen2.5-VL-3B-Instruct", EMBEDDED)


def script(*words: object) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"GVE_PYTHON": sys.executable}
    words = ("bash", ROOT / "experiments" / "own_videos.sh", *words)
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=1500, env=env)


def test_words_that_the_script_refuses(tmp_path: Path) -> None:
    for words, said in (
        ((tmp_path / "nowhere",), "does not exist: give a folder of videos or a csv"),
        ((tmp_path, tmp_path / "out", "more"), "one folder or csv, and one OUT"),
        ((tmp_path, "--modle", "x"), "unknown option --modle"),
        ((tmp_path, "--model"), "--model needs a value"),
    ):
        done = script(*words)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert said in line
    done = script("--help")
    assert done.returncode == 0
    assert "--captioner" in done.stdout
    assert "set -euo" not in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_from_real_files_to_a_search(real: Path, tmp_path: Path) -> None:
    """Twelve small files, two of them damaged, of the real folder; then again, which does nothing twice."""
    folder = tmp_path / "videos"
    folder.mkdir()
    manifest = json.loads((real / "manifest.json").read_text())["videos"]
    small = sorted((one for one in manifest if one["expect"] == "decodes"), key=lambda one: one["bytes"])
    rows = [["video", "caption"]]
    for one in small[4:14]:
        shutil.copy(real / one["file"], folder)
        rows.append([f"videos/{Path(one['file']).name}", one.get("caption") or ""])
    for bad in ("no_timescale.mp4", "corrupted.mp4"):
        shutil.copy(real / "videos" / "corrupt" / bad, folder)
        rows.append([f"videos/{bad}", "damaged"])
    with open(tmp_path / "mine.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    out = tmp_path / "out"
    words = (tmp_path / "mine.csv", out, "--model", "toy", "--passes", "4", "--test-share", "0.4")
    done = script(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("split.json", "before/run.json", "after/run.json", "comparison.txt", "model/gve.json", "index"):
        assert (out / name).exists(), name
    assert "own-I2V" in (out / "comparison.txt").read_text()
    assert "no_timescale.mp4" in done.stdout
    command = next(line for line in done.stdout.splitlines() if line.startswith("search")).split(maxsplit=1)[1]
    command = command.replace("what you look for", "a table") + " --json"
    found = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=200, cwd=ROOT)
    hits = json.loads(found.stdout)["hits"]
    assert {Path(hit["path"]).parent for hit in hits} == {folder}
    model = (out / "model" / "model.safetensors").stat().st_mtime_ns
    again = script(*words)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "reusing" in again.stdout
    assert (out / "model" / "model.safetensors").stat().st_mtime_ns == model


@pytest.mark.slow
def test_fewer_than_four_videos_end_in_one_line(clips: list[Path], tmp_path: Path) -> None:
    (tmp_path / "few").mkdir()
    for clip in clips[:3]:
        shutil.copy(clip, tmp_path / "few")
    done = script(tmp_path / "few", tmp_path / "out")
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if "error" in line] == done.stderr.splitlines()[-1:]
    assert "3 different videos of 3 files can be used, 4 are needed" in done.stderr


def of_right_length(seen: Seen) -> Any:
    """Two thirds of the words that a slot may have, with what the rules of each kind of text ask for."""

    def fill(schema: dict[str, Any]) -> Any:
        if schema.get("type") == "object":
            return {key: fill(value) for key, value in schema["properties"].items()}
        if "maxLength" in schema:
            words = 2 * schema["maxLength"] // (3 * CHARS_PER_WORD)
            return " ".join(["like", "this,", *["dog"] * (words - 2)])
        return instance(schema, seen.id)

    return fill(seen.body["response_format"]["json_schema"]["schema"])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_captions_of_a_server_are_what_is_tuned_on(clips: list[Path], tmp_path: Path) -> None:
    """Without any caption of one's own: all texts are the server's. The tiny base stands where the base would."""
    out = tmp_path / "out"

    async def run() -> tuple[subprocess.CompletedProcess[str], Counter[str]]:
        async with SynthServer(answer=of_right_length, remember=False) as server:
            words = (clips[0].parent, out, "--captioner", f"{server.url}#toy", "--test-share", "0.3", "--passes", "2")
            return await asyncio.to_thread(script, *words), server.attempts

    done, asked = asyncio.run(run())
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(asked) >= 5  # one for each training video at least
    tasks = {source.record.task for source in open_sources(str(out / "synth" / "shards")).values()}
    assert {"T2V", "T2T", "T2I"} <= tasks
    assert (out / "model" / "gve.json").exists()
    assert "own-I2V" in (out / "comparison.txt").read_text()
