"""Builders: the sources' own files to sets in the released layout.

Counts of the real annotation files are those of their publishers and were counted by hand once (in the comments); other
rows are of the documented format, made here. Sets are read back by the reader that evaluation uses.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from gve.cli import main
from gve.eval.builders import BUILDERS, Options, Prepared, prepare
from gve.eval.builders.concat import concatenate
from gve.eval.builders.files import MediaFolder, SourceFiles, stem
from gve.eval.builders.layout import choose
from gve.eval.classification import CLASSIFICATION
from gve.eval.records import SETS
from gve.eval.uvrb import RetrievalSet, UVRBReader
from gve.items import InputError
from gve.video import Sampling, decode, decode_image, frame_indices, probe
from test_video import shown_index, write_clip


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def jsonl(path: Path, rows: Sequence[Any]) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        write(folder / name, f"bytes of {name}")
    return folder


def built(name: str, root: Path, source: Path, media: Path | None = None, **options: Any) -> RetrievalSet:
    prepare(name, root, source, media=media, options=Options(**options))
    return UVRBReader(root).read(name)


def asked(tested: RetrievalSet) -> dict[str, set[str]]:
    """Query text -> ids of its positives."""
    return {
        query.text: {tested.corpus[row].id for row in rows}
        for query, rows in zip(tested.queries, tested.positives, strict=True)
    }


def test_every_set_has_a_builder() -> None:
    assert set(BUILDERS) == {record.name for record in (*SETS, *CLASSIFICATION)}


# -- real annotation files


def test_real_msrvtt(real: Path, tmp_path: Path) -> None:
    tested = built("MSRVTT", tmp_path, real / "annotations" / "msrvtt")
    assert (len(tested.queries), len(tested.corpus)) == (1000, 1000)
    assert len({query.text for query in tested.queries}) == 995
    # 991 sentences stand once, three twice and one three times: 991 + 3 * 2 * 2 + 3 * 3 (query, clip) pairs.
    assert sum(map(len, tested.positives)) == 1012
    assert not tested.notes  # the repeated sentences are the published list's own
    first = tested.queries[0]
    assert (first.id, first.text) == ("ret0", "a person is connecting something to system")
    assert [tested.corpus[row].id for row in tested.positives[0]] == ["video9770"]


def test_real_msrvtt_in_the_other_dialect(real: Path, tmp_path: Path) -> None:
    """Semicolons and CRLF: the 30 rows equal the first 30 of the comma file."""
    folder = real / "annotations" / "msrvtt"
    one = built("MSRVTT", tmp_path / "a", folder / "msrvtt_test.csv")
    other = built("MSRVTT", tmp_path / "b", folder / "MSRVTT_JSFUSION_test.semicolon_crlf.excerpt.csv")
    assert [(q.id, q.text) for q in other.queries] == [(q.id, q.text) for q in one.queries[:30]]
    assert [item.id for item in other.corpus] == [item.id for item in one.corpus[:30]]


def test_real_didemo(real: Path, tmp_path: Path) -> None:
    tested = built("DiDeMo", tmp_path, real / "annotations" / "didemo")
    assert (len(tested.queries), len(tested.corpus)) == (1004, 1004)
    assert [len(rows) for rows in tested.positives] == [1] * 1004
    # Of 4,021 sentences 3,932 belong to listed names; the longest paragraph has 81 words, 12 sentences hold stray
    # blanks.
    words = [len(query.text.split()) for query in tested.queries]
    assert max(words) == 81
    assert sum(words) / 1004 == pytest.approx(29.41, abs=0.005)
    assert not any("\n" in query.text or "  " in query.text.replace(".  ", ". ") for query in tested.queries[:50])
    facts = tested.facts["decisions"]["left_out"]
    assert facts.startswith("89 sentences of 33 names")  # 4021 - 3932, 1037 - 1004
    assert "33 of them are listed under another suffix" in facts
    # The order of the file, not of annotation ids: the first listed video's sentences as they stand.
    rows = json.loads((real / "annotations" / "didemo" / "test_data.json").read_text())
    name = (real / "annotations" / "didemo" / "test_list.txt").read_text().splitlines()[0]
    assert tested.queries[0].text == " ".join(row["description"].strip() for row in rows if row["video"] == name)
    bare = [item for item in tested.corpus if item.id == "10052357@N03_7585070382_5762149bfc"]
    assert len(bare) == 1  # listed with a bare dot at its end


def test_real_dream1k(real: Path, tmp_path: Path) -> None:
    tested = built("DREAM-E", tmp_path, real / "annotations" / "dream1k")
    assert (len(tested.queries), len(tested.corpus)) == (6251, 1000)
    assert sum(map(len, tested.positives)) == 6295  # distinct (event, video) pairs of 6,298 events
    answered = {tested.corpus[row].id for rows in tested.positives for row in rows}
    assert {item.id for item in tested.corpus} - answered == {"649", "804", "980", "981"}  # distractors without event
    # Negative control: folding case and full stops would lose queries (6,232 are left), so it must not be done.
    assert len({query.text.lower().rstrip(".") for query in tested.queries}) == 6232


def test_real_camerabench(real: Path, tmp_path: Path) -> None:
    folder = real / "annotations" / "camerabench"
    tested = built("CMRB", tmp_path / "a", folder / "caption_data.json")
    assert (len(tested.queries), len(tested.corpus)) == (727, 1071)
    assert sum(len(rows) > 1 for rows in tested.positives) == 77
    assert max(map(len, tested.positives)) == 67
    assert tested.corpus[0].id == "IWv0EhEGmNI.16.6"
    assert "727 queries where 728 are published" in tested.notes[0]
    # The hub's form of the same rows: GIF paths, `caption`, labels beside.
    rows = json.loads((folder / "caption_data.json").read_text())
    hub = [
        {"path": f"videos_gif/{row['video'][:-4]}.gif", "labels": ["static"], "caption": row["answer"]} for row in rows
    ]
    other = built("CMRB", tmp_path / "b", jsonl(tmp_path / "hub" / "test.jsonl", hub).parent)
    assert asked(other) == asked(tested)
    assert other.data_hash == tested.data_hash


# -- captions in documented formats


def test_carebench_takes_one_field_a_set(tmp_path: Path) -> None:
    rows = [
        {"video": f"v{i}.mp4", "caption": f"all {i}", "spatial_caption": f"where {i}", "temporal_caption": ["when", ""]}
        for i in range(3)
    ]
    write(tmp_path / "src" / "json" / "metadata.json", json.dumps(rows))
    touch(tmp_path / "src" / "videos", "v0.mp4", "v1.mp4", "v2.mp4")
    reader = UVRBReader(prepare_all(tmp_path / "root", ["CRB-G", "CRB-S", "CRB-T"], tmp_path / "src"))
    sets = {name: reader.read(name) for name in reader.names()}
    assert asked(sets["CRB-G"]) == {f"all {i}": {f"v{i}"} for i in range(3)}
    assert asked(sets["CRB-S"]) == {f"where {i}": {f"v{i}"} for i in range(3)}
    assert asked(sets["CRB-T"]) == {"when": {"v0", "v1", "v2"}}  # one text, all its clips
    # The three sets show the same objects, so the clips are hashed and encoded once.
    assert all(sets["CRB-G"].corpus[i].media[0] is sets["CRB-T"].corpus[i].media[0] for i in range(3))
    assert not any(tested.missing for tested in sets.values())


def prepare_all(root: Path, names: Sequence[str], source: Path) -> Path:
    for name in names:
        prepare(name, root, source)
    return root


def test_vdc_reads_both_keys_and_keeps_silent_clips(tmp_path: Path) -> None:
    rows = [
        {"video_name": "part1/aa-bb.mp4", "main_object_caption": "a cat", "detailed_caption": "a long tale"},
        {"video_id": "0f3e", "main_object_caption": " a cat ", "detailed_caption": ""},
        {"video_name": "part2/cc.mp4", "main_object_caption": None, "detailed_caption": "a long tale"},
    ]
    source = jsonl(tmp_path / "src" / "VDC_1k.jsonl", rows).parent
    objects, details = built("VDC-O", tmp_path / "root", source), built("VDC-D", tmp_path / "root", source)
    assert asked(objects) == {"a cat": {"part1/aa-bb", "0f3e"}}
    assert asked(details) == {"a long tale": {"part1/aa-bb", "part2/cc"}}
    assert len(details.corpus) == 3
    assert details.facts["decisions"]["clips_without_text"] == 1


def test_vdc_refuses_the_question_files(real: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="questions of VDCScore"):
        prepare("VDC-D", tmp_path, real / "annotations" / "vdc" / "VDCScore_detailed.excerpt.jsonl")


def test_line_separators_inside_texts_survive(tmp_path: Path) -> None:
    """U+2028 is a line end to str.splitlines and none to JSON."""
    rows = [{"video": "a.mp4", "caption": "one\u2028two"}, {"video": "b.mp4", "caption": "three"}]
    source = write(tmp_path / "src" / "metadata.json", json.dumps(rows, ensure_ascii=False))
    assert asked(built("CRB-G", tmp_path / "root", source)) == {"one\u2028two": {"a"}, "three": {"b"}}


# -- I2V: a frame


@pytest.fixture(scope="module")
def msrvtt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clips of 40 frames whose pixels tell their index, one of 6, and their list."""
    folder = tmp_path_factory.mktemp("msrvtt")
    names = ["video7020", "video7021", "video7022", "video7023"]
    (folder / "videos" / "all").mkdir(parents=True)
    for name, frames in zip(names, (40, 40, 40, 6), strict=True):
        write_clip(folder / "videos" / "all" / f"{name}.mp4", frames)
    rows = "".join(f"ret{i},msr{name[5:]},{name},words {i}\n" for i, name in enumerate(names))
    write(folder / "MSRVTT_JSFUSION_test.csv", f"key,vid_key,video_id,sentence\n{rows}")
    return folder


def test_i2v_frames_are_none_of_the_eight(msrvtt: Path, tmp_path: Path) -> None:
    tested = built("MSRVTT-I2V", tmp_path, msrvtt)
    assert [query.modality for query in tested.queries] == ["I"] * 4
    assert not tested.missing
    sampled = set(frame_indices(40, 10.0, Sampling.uniform(8)).tolist())
    chosen = []
    for query in tested.queries[:3]:
        pixels = decode_image(str(query.media[0].source))
        chosen.append(round((pixels.mean() - 19.5) / 5))
    assert not set(chosen) & sampled
    assert len(set(chosen)) > 1  # each clip has a draw of its own
    # Negative control: reading a frame's index from its pixels does find the sampled ones.
    clip = decode(msrvtt / "videos" / "all" / "video7020.mp4", Sampling.uniform(8))
    assert set(shown_index(clip).round().astype(int).tolist()) == sampled
    assert any("cut by this project with seed 0" in note for note in tested.notes)
    assert decode_image(str(tested.queries[3].media[0].source)).shape == (64, 96, 3)  # has no other frame


def test_i2v_is_seeded_and_resumes(msrvtt: Path, tmp_path: Path) -> None:
    def frames(root: Path, seed: int) -> dict[str, str]:
        tested = built("MSRVTT-I2V", root, msrvtt, seed=seed)
        return {query.id: query.media[0].content_hash() for query in tested.queries}

    first = frames(tmp_path / "a", 0)
    assert frames(tmp_path / "b", 0) == first
    assert frames(tmp_path / "b", 1) != first
    kept = tmp_path / "a" / "MSRVTT-I2V" / "images" / "seed0"
    (kept / "video7021.jpg").unlink()
    stamp = (kept / "video7020.jpg").stat().st_mtime_ns
    assert frames(tmp_path / "a", 0) == first
    assert (kept / "video7020.jpg").stat().st_mtime_ns == stamp  # only what was missing is cut


def test_i2v_names_what_it_could_not_cut(msrvtt: Path, tmp_path: Path) -> None:
    source = shutil.copytree(msrvtt, tmp_path / "src")
    (source / "videos" / "all" / "video7021.mp4").write_bytes(b"no video")
    (source / "videos" / "all" / "video7022.mp4").unlink()
    prepared = prepare("MSRVTT-I2V", tmp_path / "root", source)
    assert set(prepared.failed) == {"images/seed0/video7021.jpg", "images/seed0/video7022.jpg"}
    assert "not-a-video" in prepared.failed["images/seed0/video7021.jpg"]
    assert len(UVRBReader(tmp_path / "root").read("MSRVTT-I2V").missing) == 3  # two frames and the clip
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="--media"):
        prepare("MSRVTT-I2V", tmp_path / "root", source, media=tmp_path / "empty")


# -- LoVR: long videos


def write_scene(path: Path, first: int, frames: int, side: int = 64) -> Path:
    """A clip whose frames go on counting where the scene before ended, with B frames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "4", "bf": "2"})
        stream.height, stream.width, stream.pix_fmt = side, side, "yuv420p"
        for index in range(first, first + frames):
            noise = np.random.default_rng(index).integers(0, 40, (side, side, 3)) + 5 * index
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise.astype(np.uint8), format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def lovr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two long videos, one with a name that begins with a dash and with scenes 2, 9, 10: as text, 10 comes first."""
    folder = tmp_path_factory.mktemp("lovr")
    clips = folder / "video_data" / "long_video_clip"
    for first, frames, number in ((0, 8, "2"), (8, 7, "9"), (15, 9, "10")):
        write_scene(clips / "-7wwfGJXEZg" / f"-7wwfGJXEZg-Scene-{number}.mp4", first, frames)
    for first, frames, number in ((0, 6, "001"), (6, 6, "002")):
        write_scene(clips / "abc" / f"abc-Scene-{number}.mp4", first, frames)
    (clips / "fR9dhkJyNNo").mkdir()  # the extraction has an empty folder
    captions = [{"vid": "-7wwfGJXEZg", "cap": "a long story"}, {"vid": "abc", "cap": "another"}]
    parquet(folder / "caption_data" / "video_test.parquet", captions[:1])
    parquet(folder / "caption_data" / "video_train.parquet", captions[1:])
    return folder


def test_lovr_v_joins_scenes_in_natural_order(lovr: Path, tmp_path: Path) -> None:
    tested = built("LoVR-V", tmp_path, lovr)
    assert asked(tested) == {"a long story": {"-7wwfGJXEZg"}}
    assert {item.id for item in tested.corpus} == {"-7wwfGJXEZg", "abc"}  # the train part is a distractor
    assert not tested.missing
    joined = tmp_path / "media" / "LoVR-long" / "-7wwfGJXEZg.mp4"
    info = probe(joined)
    assert (info.num_frames, round(info.duration_s, 3)) == (24, 2.4)
    clip = decode(joined, Sampling.uniform(24), verify=True)
    assert shown_index(clip).round().astype(int).tolist() == list(range(24))
    assert np.diff(clip.times_s) == pytest.approx(np.full(23, 0.1), abs=1e-3)  # no gap and no jump where clips meet
    # Copied, not encoded again: every frame equals that of its clip to the bit.
    scene = decode(
        lovr / "video_data" / "long_video_clip" / "-7wwfGJXEZg" / "-7wwfGJXEZg-Scene-9.mp4", Sampling.uniform(8)
    )
    assert np.array_equal(clip.pixels[8], scene.pixels[0])
    gaps = tested.facts["decisions"]["scene_numbers_that_are_not_there"]
    assert gaps == {"-7wwfGJXEZg": [1, 3, 4, 5, 6, 7, 8]}


def test_joining_in_the_order_of_text_is_caught(lovr: Path, tmp_path: Path) -> None:
    """Negative control of the test above: sorted as text, scene 10 comes first and the frames count wrongly."""
    clips = sorted(map(str, (lovr / "video_data" / "long_video_clip" / "-7wwfGJXEZg").iterdir()))
    assert concatenate(clips, str(tmp_path / "wrong.mp4")) == 24
    shown = shown_index(decode(tmp_path / "wrong.mp4", Sampling.uniform(24))).round().astype(int).tolist()
    assert shown == [*range(15, 24), *range(8), *range(8, 15)]


def test_lovr_c2v_draws_one_clip_a_video(lovr: Path, tmp_path: Path) -> None:
    tested = built("LoVR-C2V", tmp_path / "root", lovr)
    assert [item.id for item in tested.corpus] == ["-7wwfGJXEZg", "abc"]
    assert tested.positives == ((0,), (1,))
    assert all("-Scene-" in query.media[0].name for query in tested.queries)
    assert not tested.missing
    stamp = (tmp_path / "root" / "media" / "LoVR-long" / "abc.mp4").stat().st_mtime_ns
    built("LoVR-V", tmp_path / "root", lovr)  # shares the joined files
    assert (tmp_path / "root" / "media" / "LoVR-long" / "abc.mp4").stat().st_mtime_ns == stamp
    assert built("LoVR-C2V", tmp_path / "again", lovr).data_hash == tested.data_hash
    hashes = {built("LoVR-C2V", tmp_path / "root", lovr, seed=seed).data_hash for seed in range(5)}
    assert len(hashes) > 1


def test_scenes_that_do_not_fit_are_named(lovr: Path, tmp_path: Path) -> None:
    source = shutil.copytree(lovr, tmp_path / "src")
    clips = source / "video_data" / "long_video_clip"
    write_scene(clips / "abc" / "abc-Scene-003.mp4", 0, 6, side=32)
    (clips / "-7wwfGJXEZg" / "-7wwfGJXEZg-Scene-9.mp4").write_bytes(b"no video")
    prepared = prepare("LoVR-C2V", tmp_path / "root", source)
    assert "coded in another way" in prepared.failed["abc.mp4"]
    assert "Invalid data" in prepared.failed["-7wwfGJXEZg.mp4"]
    assert not list((tmp_path / "root" / "media" / "LoVR-long").iterdir())  # no half of a file


def test_lovr_takes_whole_files_where_the_user_has_them(lovr: Path, tmp_path: Path) -> None:
    source = shutil.copytree(lovr, tmp_path / "src")
    (source / "whole").mkdir()
    write_clip(source / "whole" / "abc.mp4", 12)
    tested = built("LoVR-V", tmp_path / "root", source)
    names = {item.id: item.media[0].name for item in tested.corpus}
    assert names == {"abc": "media/LoVR/whole/abc.mp4", "-7wwfGJXEZg": "media/LoVR-long/-7wwfGJXEZg.mp4"}


def test_lovr_needs_to_know_what_is_tested(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "src" / "all_video.jsonl", [{"vid": "a", "cap": "b"}]).parent
    with pytest.raises(InputError, match="which says what is tested"):
        prepare("LoVR-V", tmp_path / "root", source)
    jsonl(tmp_path / "src" / "video_test.jsonl", [{"vid": "a", "cap": "b"}])
    prepared = prepare("LoVR-V", tmp_path / "root", source)
    assert prepared.absent == ("a.mp4",)  # listings without clips


@pytest.mark.parametrize("form", ["rows", "mapping"])
def test_lovr_themes(tmp_path: Path, form: str) -> None:
    themes = {"a-Scene-001": "calm", "a-Scene-002": "calm", "b-Scene-001": "storm"}
    rows = [{"path": f"x/{clip}.mp4", "theme": theme} for clip, theme in themes.items()]
    write(tmp_path / "src" / "clip_themes.json", json.dumps(themes if form == "mapping" else rows))
    touch(tmp_path / "src" / "long_video_clip" / "a", "a-Scene-001.mp4")
    tested = built("LoVR-TH", tmp_path / "root", tmp_path / "src")
    assert asked(tested) == {"calm": {"a-Scene-001", "a-Scene-002"}, "storm": {"b-Scene-001"}}
    assert len(tested.missing) == 2


# -- PE-Video: tars


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def pe_members(first: int, keywords: Sequence[Any]) -> dict[str, bytes]:
    members = {}
    for number, value in enumerate(keywords, first):
        members[f"{number:05d}.mp4"] = f"video {number}".encode() * 100
        members[f"{number:05d}.json"] = json.dumps({"video_id": number, "keywords": value}).encode()
    return members


def test_pe_video_tars(tmp_path: Path) -> None:
    source = tmp_path / "src" / "test"
    write_tar(source / "000.tar", pe_members(0, [["dog", "park"], "cat, sofa", None]))
    path = write_tar(source / "001.tar", pe_members(3, [["dog", "park"], []]))
    tested = built("PEV-K", tmp_path / "root", source)
    assert asked(tested) == {"dog, park": {"00000", "00003"}, "cat, sofa": {"00001"}}
    assert len(tested.corpus) == 5
    assert not tested.missing
    assert (tmp_path / "root" / "media" / "PE-Video" / "00002.mp4").read_bytes() == b"video 2" * 100
    recorded = {row["name"]: row for row in tested.facts["files"]}
    assert recorded["001.tar"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    # A half-written clip of an interrupted run is made whole, the others are left alone.
    cut, whole = (tmp_path / "root" / "media" / "PE-Video" / name for name in ("00001.mp4", "00002.mp4"))
    cut.write_bytes(b"vid")
    stamp = whole.stat().st_mtime_ns
    again = built("PEV-K", tmp_path / "root", source, joiner="; ")
    assert cut.read_bytes() == b"video 1" * 100
    assert whole.stat().st_mtime_ns == stamp
    assert "dog; park" in asked(again)


def test_pe_video_loose_files_and_contradictions(tmp_path: Path) -> None:
    source = tmp_path / "src"
    write(source / "a" / "0012.json", json.dumps({"video_id": 12, "keywords": "x"}))
    touch(source / "a", "0012.mp4")
    tested = built("PEV-K", tmp_path / "root", source)
    assert asked(tested) == {"x": {"0012"}}
    assert not tested.missing
    write(source / "a" / "0013.json", json.dumps({"video_id": 14, "keywords": "x"}))
    with pytest.raises(InputError, match="the json of 0013 says video_id 14"):
        prepare("PEV-K", tmp_path / "root", source)
    broken = write_tar(tmp_path / "tars" / "000.tar", pe_members(0, ["a"]))
    broken.write_bytes(broken.read_bytes()[:900])
    with pytest.raises(InputError, match="is damaged"):
        prepare("PEV-K", tmp_path / "other", broken.parent)


# -- MomentSeeker


def mmeb_row(text: str, media: str, movie: str, negatives: int = 9) -> dict[str, Any]:
    return {
        "query": text,
        "input_frames": media,
        "positive_frames": [{"output_path": f"{movie}/0.00_3.00.mp4"}],
        "negative_frames": [{"output_path": f"{movie}/{i}.00_{i + 3}.00.mp4"} for i in range(3, 3 + negatives)],
    }


def test_momentseeker_in_the_form_of_mmeb(tmp_path: Path) -> None:
    rows = [
        mmeb_row("what next", "videos/movie1_2.mp4", "movie1_2"),
        mmeb_row("who is it", "images/p7.jpg", "movie1_3"),
        mmeb_row("only text", "", "movie1_3"),
        mmeb_row("what next", "videos/movie101_77.mp4", "movie1_3", negatives=8),  # the same words, other candidates
    ]
    source = jsonl(tmp_path / "src" / "MomentSeeker_1k8.jsonl", rows).parent
    media = touch(tmp_path / "media", "query_images/p7.jpg", "movie1_2.mp4", "movie1_2_0.00_3.00.mp4",
                  "clips/movie1_3/0.00_3.00.mp4")  # fmt: skip
    videos = built("MS-TV", tmp_path / "root", source, media)
    assert [query.modality for query in videos.queries] == ["TV", "TV"]
    assert [query.id for query in videos.queries] == ["ms-tv-00000", "ms-tv-00003"]  # by place, texts repeat
    assert videos.pools is not None
    assert [len(pool) for pool in videos.pools] == [10, 9]
    assert [videos.corpus[row].id for row in videos.positives[1]] == ["movie1_3/0.00_3.00"]
    assert "1 queries have another number of candidates than 10" in videos.notes
    assert videos.facts["decisions"]["query_clip_that_VLM2Vec_calls_damaged"] == ["ms-tv-00003"]
    places = {item.id: item.media[0].name for item in videos.corpus}
    # The flat name and the nested one are found; another film's clip of the same seconds is not taken for it.
    assert places["movie1_2/0.00_3.00"] == "media/MomentSeeker/movie1_2_0.00_3.00.mp4"
    assert places["movie1_3/0.00_3.00"] == "media/MomentSeeker/clips/movie1_3/0.00_3.00.mp4"
    assert "media/MomentSeeker/movie1_2/3.00_6.00.mp4" in videos.missing
    images = built("MS-TI", tmp_path / "root", source, media)
    assert [(query.text, query.media[0].name) for query in images.queries] == [
        ("who is it", "media/MomentSeeker/query_images/p7.jpg")
    ]


def test_momentseeker_in_its_first_form(tmp_path: Path) -> None:
    row = {
        "qry_text": " where ",
        "qry_img_path": "",
        "qry_video_path": "./q/movie5_1.mp4",
        "candidate_video_list": [{"frame_path": f"./movie5_{i}/1.00_4.00.mp4"} for i in range(10)],
        "gt_indices": [4, 7],
    }
    write(tmp_path / "src" / "momentseeker.json", json.dumps([row, row | {"qry_video_path": ""}]))
    tested = built("MS-TV", tmp_path / "root", tmp_path / "src")
    assert tested.queries[0].text == "where"
    assert {tested.corpus[r].id for r in tested.positives[0]} == {"movie5_4/1.00_4.00", "movie5_7/1.00_4.00"}
    assert tested.pools is not None
    assert len(tested.pools[0]) == 10
    with pytest.raises(InputError, match="no query of text and an image"):
        prepare("MS-TI", tmp_path / "root", tmp_path / "src")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"qry_text": "a", "answering_time_interval": [[1, 2]]}, "time intervals and no candidates"),
        ({"candidate_video_list": ["a.mp4"], "gt_indices": [1], "qry_text": "x"}, "of 1 candidates"),
        ({"question": "a"}, "of no known form"),
    ],
)
def test_momentseeker_refuses(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    write(tmp_path / "src" / "ti2v.json", json.dumps([row]))
    with pytest.raises(InputError, match=message):
        prepare("MS-TI", tmp_path / "root", tmp_path / "src")


# -- files, links, writing


@pytest.mark.parametrize("form", ["json", "jsonl", "semicolon", "tab", "parquet", "parts"])
def test_tables_in_every_format(tmp_path: Path, form: str) -> None:
    rows = [{"video_id": f"video{i}", "sentence": f"a, b {i}"} for i in range(4)]
    source = tmp_path / "src"
    if form == "json":
        write(source / "test_1k.json", json.dumps(rows))
    elif form == "jsonl":
        write(source / "test_1k.jsonl", "\ufeff" + "\r\n".join(json.dumps(row) for row in rows))
    elif form in ("semicolon", "tab"):
        mark = ";" if form == "semicolon" else "\t"
        lines = [mark.join(rows[0]), *(mark.join(row.values()) for row in rows)]
        write(source / "MSRVTT_JSFUSION_test.csv", "\r\n".join(lines))
    elif form == "parquet":
        parquet(source / "test_1k.parquet", [row | {"video": b"bytes of a clip"} for row in rows])
    else:
        parquet(source / "test-00000-of-00002.parquet", rows[:2])
        parquet(source / "test-00001-of-00002.parquet", rows[2:])
    tested = built("MSRVTT", tmp_path / "root", source)
    assert asked(tested) == {f"a, b {i}": {f"video{i}"} for i in range(4)}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.json", "[{", "is not JSON"),
        ("metadata.json", "[1]", "something else than objects"),
        ("metadata.json", b"\xff\xfe", "neither UTF-8 text nor parquet"),
        ("metadata.json", b"PAR1....PAR1", "not a parquet file"),
        ("metadata.json", '[{"clip": "a"}]', "a row has no video; its fields are clip"),
        ("metadata.json", '[{"video": "a.mp4"}, {"video": "a.mp4"}]', "clip a.mp4 stands twice"),
        ("other.txt", "x", "holds no metadata.json .* get data set MCG-NJU"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    write(tmp_path / "src" / name, content)
    with pytest.raises(InputError, match=message) as caught:
        prepare("CRB-G", tmp_path / "root", tmp_path / "src")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "root" / "CRB-G").exists()


def test_a_csv_row_with_a_stray_comma_is_refused(tmp_path: Path) -> None:
    source = write(
        tmp_path / "src" / "msrvtt_test.csv", "key,vid_key,video_id,sentence\nret0,m,video1,one, two\n"
    ).parent
    with pytest.raises(InputError, match="not as many fields"):
        prepare("MSRVTT", tmp_path / "root", source)


def test_different_files_of_one_name_are_not_guessed_between(tmp_path: Path) -> None:
    for folder, text in (("a", "[]"), ("b", "[{}]")):
        write(tmp_path / folder / "metadata.json", text)
    with pytest.raises(InputError, match="pass the right one as --from"):
        SourceFiles(tmp_path).find("metadata.json")
    write(tmp_path / "b" / "metadata.json", "[]")
    assert SourceFiles(tmp_path).find("metadata.json") == [tmp_path / "a" / "metadata.json"]


def test_stems() -> None:
    assert stem("IWv0EhEGmNI.16.6.mp4") == "IWv0EhEGmNI.16.6"
    assert stem("10052357@N03_7585070382_5762149bfc.") == "10052357@N03_7585070382_5762149bfc"
    assert stem("a.b/none") == "a.b/none"
    assert stem("a/.hidden") == "a/.hidden"


def test_clips_are_found_by_name(tmp_path: Path) -> None:
    folder = touch(tmp_path, "x/one.mkv", "x/two.mov", "y/two.mp4", "y/three.mp4", "z/three.mp4", "one.json")
    touch(folder, "four.jpg", "z/four.avi", "[a] b~!.avi")
    media = MediaFolder(folder, "S")
    assert media.find("one.mp4") == "x/one.mkv"
    assert media.find("two.mov") == "x/two.mov"
    assert media.find("two.webm") == "y/two.mp4"  # mp4 before others
    assert media.find("z/three.mp4") == "z/three.mp4"
    assert media.find("four.mp4") == "z/four.avi"  # a picture is no clip
    assert media.find("four.png") == "four.jpg"
    assert media.find("[a] b~!.avi") == "[a] b~!.avi"  # no glob
    assert media.find("five.mp4") is None
    with pytest.raises(InputError, match="both fit"):
        media.find("three.mp4")


def test_media_are_linked_not_copied(tmp_path: Path) -> None:
    source = write(tmp_path / "src" / "metadata.json", json.dumps([{"video": "a.mp4", "caption": "x"}])).parent
    media, root = touch(tmp_path / "elsewhere", "deep/a.mp4"), tmp_path / "root"
    tested = built("CRB-G", root, source, media)
    link = root / "media" / "CaReBench"
    assert link.is_symlink()
    assert os.path.samefile(str(tested.corpus[0].media[0].source), media / "deep" / "a.mp4")
    other = touch(tmp_path / "other", "a.mp4")
    with pytest.raises(InputError, match="already shows"):
        prepare("CRB-G", root, source, media=other)
    shutil.rmtree(media)  # moved: the dead link gives way
    prepare("CRB-G", root, source, media=other)
    assert link.resolve() == other
    # The listing names the same files wherever they lie, so two machines have one data hash.
    assert built("CRB-G", tmp_path / "third", source, other).data_hash == UVRBReader(root).read("CRB-G").data_hash


def test_prepare_does_not_write_over_the_release(tmp_path: Path) -> None:
    source = write(tmp_path / "src" / "metadata.json", json.dumps([{"video": "a.mp4", "caption": "x"}])).parent
    released = touch(tmp_path / "root" / "CRB-G" / "jsonl", "queries.jsonl")
    with pytest.raises(InputError, match="did not write"):
        prepare("CRB-G", tmp_path / "root", source)
    assert (released / "queries.jsonl").read_text() == "bytes of queries.jsonl"
    prepare("CRB-G", tmp_path / "root", source, options=Options(replace=True))
    prepare("CRB-G", tmp_path / "root", source)  # its own work it may renew
    assert asked(UVRBReader(tmp_path / "root").read("CRB-G")) == {"x": {"a"}}
    assert sorted(path.name for path in (tmp_path / "root" / "CRB-G").iterdir()) == ["jsonl", "set.json"]


def test_an_interrupted_write_leaves_no_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the two renames there is no set, never half of the old one; the next run mends it."""
    source = write(tmp_path / "src" / "metadata.json", json.dumps([{"video": "a.mp4", "caption": "x"}]))
    root = tmp_path / "root"
    prepare("CRB-G", root, source)
    real_rename, calls = os.rename, []

    def killed(old: Any, new: Any) -> None:
        calls.append(old)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real_rename(old, new)

    write(source, json.dumps([{"video": "b.mp4", "caption": "y"}]))
    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare("CRB-G", root, source)
    monkeypatch.undo()
    with pytest.raises(InputError, match="holds no UVRB set"):
        UVRBReader(root).names()
    prepare("CRB-G", root, source)
    assert asked(UVRBReader(root).read("CRB-G")) == {"y": {"b"}}


def test_draws_depend_on_their_key_alone() -> None:
    draws = [choose(10, "C2V", 0, f"video{i}") for i in range(2000)]
    assert set(draws) == set(range(10))
    # Uniform: 200 expected a bin, standard deviation 13.4; five of them would be 67.
    assert max(abs(draws.count(value) - 200) for value in range(10)) < 67
    assert choose(10, "C2V", 0, "video7") == draws[7]
    # First 8 bytes of SHA-256 of the joined fields, scaled: by hand.
    expected = int.from_bytes(hashlib.sha256(b"C2V\x000\x00video7").digest()[:8], "big") * 10 >> 64
    assert draws[7] == expected


# -- the command


def command(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `gve uvrb ...`."""
    with pytest.raises(SystemExit) as end:
        main(["uvrb", *words])
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def test_prepare_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "src" / "metadata.json", json.dumps([{"video": "a.mp4", "caption": "x"}])).parent
    root = ("--root", str(tmp_path / "root"))
    code, out, _ = command(capsys, "prepare", *root, "--set", "crb_g", "--from", str(source), "--json")
    assert code == 0
    assert json.loads(out)["CRB-G"]["absent"] == ["a.mp4"]
    for words, message in (
        (["--set", "CRB-X", "--from", str(source)], "no UVRB set is called 'CRB-X'"),
        (["--set", "CRB-G"], "--from"),
        (["--set", "CRB-G", "--from", str(tmp_path / "none")], "no such file"),
        (["--set", "LoVR-V", "--download"], "accept its terms"),
        (["--set", "CRB-G", "--from", str(source), "--media", str(tmp_path / "none")], "no such folder"),
    ):
        code, _, err = command(capsys, "prepare", *root, *words)
        assert code == 2
        assert message in err
        assert err.count("\n") == 1


def test_prepared_is_plain(tmp_path: Path) -> None:
    source = write(tmp_path / "src" / "metadata.json", json.dumps([{"video": "a.mp4", "caption": "x"}])).parent
    prepared = prepare("CRB-G", tmp_path / "root", source)
    assert isinstance(prepared, Prepared)
    facts = prepared.facts
    assert facts == json.loads((tmp_path / "root" / "CRB-G" / "set.json").read_text())
    assert facts["builder"] == "carebench"
    assert facts["files"][0]["sha256"] == hashlib.sha256((source / "metadata.json").read_bytes()).hexdigest()
    assert str(tmp_path) not in json.dumps(facts)  # the same on every machine
