"""Weak pairs from every layout: ids that stay, media that open where they lie, nothing left out in silence."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from gve.data.manifest import Presample
from gve.data.shards import ShardWriter
from gve.items import Frames, InputError, Item, Pair, Text, Video
from gve.synth.config import build
from gve.synth.inputs import Input, InputOptions, guess, seconds
from gve.synth.media import MediaStore
from gve.synth.records import WeakPair
from gve.synth.units import Context, Outcome
from gve.video import MediaError, Sampling, probe


def mp4(count: int = 4, size: int = 32) -> bytes:
    """A clip of `count` frames."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=4)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for i in range(count):
            picture = np.full((size, size, 3), (20 * i, 255 - 20 * i, 128), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def context(root: Path) -> Context:
    def no_encoder() -> Any:
        raise AssertionError

    return Context(MediaStore(root), 0, no_encoder, lambda step: ())


def outcomes(root: Path, *sources: Mapping[str, Any]) -> list[Outcome]:
    """What the input step makes of sources as they stand in a configuration."""
    options = build(InputOptions, {"sources": [dict(source) for source in sources]}, "input")
    found = list(Input(options, context(root)).run(()))
    for outcome in found:
        outcome.check()
        json.dumps(outcome.to_dict(), allow_nan=False)
    assert len({outcome.id for outcome in found}) == len(found)
    return found


def pairs(found: list[Outcome], root: Path) -> dict[str, WeakPair]:
    store = MediaStore(root)
    return {outcome.id: store.weak_pair(row) for outcome in found for row in outcome.rows}


def reasons(found: list[Outcome]) -> dict[str, str]:
    return {reject.id: reject.reason for outcome in found for reject in outcome.rejects}


def files(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def tar(path: Path, members: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


# ------------------------------------------------------------------------------------------------------------- folders


def test_a_folder_gives_every_video_below_it(tmp_path: Path) -> None:
    root = tmp_path / "My Videos"
    files(root, "b.mp4", "a.webm", "deep/er/c.MOV", "deep/x.jpg", ".hidden/d.mp4", ".e.mp4", "no.pdf")
    (root / "b.txt").write_text("\ufeff a dog runs \n")
    (root / "deep/er/c.json").write_text('{"caption": ["one,", "two"], "n": 1}')
    found = outcomes(tmp_path, {"path": str(root)})
    assert {id: pair.caption for id, pair in pairs(found, tmp_path).items()} == {
        "my_videos:a.webm": "",
        "my_videos:b.mp4": "a dog runs",
        "my_videos:deep/er/c.MOV": "one, two",
    }
    assert pairs(found, tmp_path)["my_videos:b.mp4"].video.source == root / "b.mp4"
    assert found == outcomes(tmp_path, {"path": str(root), "kind": "folder"})


def test_a_damaged_caption_file_rejects_its_video(tmp_path: Path) -> None:
    root = tmp_path / "v"
    files(root, "a.mp4", "b.mp4")
    (root / "a.txt").write_bytes(b"\xff\xfe caf\xe9")
    assert list(reasons(outcomes(tmp_path, {"path": str(root)})).values()) == ["caption-file"]


def test_real_videos_of_a_folder(real: Path, tmp_path: Path) -> None:
    """All 82 videos of the folder, whole or damaged: what is damaged is found by those who look into the files."""
    named = [name for name in (real / "videos").rglob("*") if name.is_file()]
    found = pairs(outcomes(tmp_path, {"path": str(real / "videos"), "name": "real"}), tmp_path)
    assert set(found) <= {f"real:{path.relative_to(real / 'videos').as_posix()}" for path in named}
    assert len(found) >= 69


# --------------------------------------------------------------------------------------------------------------- lists

ROWS = [
    {"id": "x1", "video": "v/1.mp4", "caption": "one", "licence": "cc", "n": 3},
    {"id": "x2", "video": "v/2.mp4", "caption": 'two, "quoted"', "licence": "by", "n": 4},
]


def write_list(path: Path) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    else:
        import csv

        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            delimiter = "\t" if path.suffix == ".tsv" else ";" if "semicolon" in path.name else ","
            writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter, lineterminator="\r\n")
            writer.writeheader()
            writer.writerows(ROWS)
    return path


@pytest.mark.parametrize("name", ["a.csv", "semicolon.csv", "a.tsv", "a.jsonl", "a.json", "a.parquet"])
def test_lists_of_every_format_say_the_same(tmp_path: Path, name: str) -> None:
    files(tmp_path, "v/1.mp4", "v/2.mp4")
    source = {"path": str(write_list(tmp_path / name)), "name": "web", "columns": {"meta": ["licence"]}}
    found = pairs(outcomes(tmp_path, source), tmp_path)
    assert {id: (pair.caption, dict(pair.meta)) for id, pair in found.items()} == {
        "web:x1": ("one", {"licence": "cc"}),
        "web:x2": ('two, "quoted"', {"licence": "by"}),
    }
    assert found["web:x2"].video.source == tmp_path / "v/2.mp4"
    assert (found["web:x1"].start_s, found["web:x1"].end_s) == (None, None)


def jsonl(path: Path, *rows: Any) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def test_columns_are_named_by_the_configuration(tmp_path: Path) -> None:
    files(tmp_path, "clips/7.mp4")
    path = jsonl(tmp_path / "a.jsonl", {"vid": 7, "words": "seven", "from": "00:00:01.5", "to": 75})
    source = {
        "path": path,
        "media": str(tmp_path / "clips"),
        "media_name": "{vid}.mp4",
        "columns": {"id": "vid", "caption": "words", "start": "from", "end": "to"},
    }
    (pair,) = pairs(outcomes(tmp_path, source), tmp_path).values()
    assert (pair.id, pair.caption, pair.start_s, pair.end_s) == ("a:7", "seven", 1.5, 75.0)


def test_each_row_that_cannot_be_used_says_why(tmp_path: Path) -> None:
    files(tmp_path, "1.mp4", "2.mp4")
    path = jsonl(
        tmp_path / "web.jsonl",
        {"id": "a", "video": "1.mp4", "caption": "first"},
        {"id": "a", "video": "2.mp4", "caption": "again"},
        {"id": "b", "video": "3.mp4", "caption": "gone"},
        {"id": "c", "video": "../secret.mp4", "caption": "out"},
        {"id": "d", "video": "https://x.org/1.mp4", "caption": "far"},
        {"id": "e", "caption": "nothing"},
        "{torn",
        [1, 2],
        {"id": "f", "video": "2.mp4", "start": 5, "end": 3},
        {"id": "g", "video": "2.mp4", "start": "soon"},
        {"id": "h", "video": str(tmp_path / "2.mp4"), "caption": None, "end": 3},
    )
    found = outcomes(tmp_path, {"path": path})
    assert reasons(found) == {
        "web:a#2": "repeated-id",
        "web:row-3": "missing",
        "web:row-4": "outside",
        "web:row-5": "remote",
        "web:row-6": "row",
        "web:row-7": "row",
        "web:row-8": "row",
        "web:row-9": "span",
        "web:row-10": "span",
    }
    assert {id: (pair.caption, pair.end_s) for id, pair in pairs(found, tmp_path).items()} == {
        "web:a": ("first", None),
        "web:h": ("", 3.0),
    }
    assert {reject.stage for outcome in found for reject in outcome.rejects} == {"input"}


def test_without_an_id_the_video_and_its_span_name_a_row(tmp_path: Path) -> None:
    """Several captions, or several spans, of one video are pairs of their own."""
    files(tmp_path, "1.mp4")
    path = jsonl(
        tmp_path / "web.jsonl",
        {"video": "1.mp4", "caption": "a"},
        {"video": "1.mp4", "caption": "b"},
        {"video": "1.mp4", "caption": "c", "start": 1, "end": 2.5},
        {"video": "1.mp4", "caption": "d", "start": 2.5},
    )
    found = pairs(outcomes(tmp_path, {"path": path}), tmp_path)
    assert {id: pair.caption for id, pair in found.items()} == {
        "web:1.mp4": "a",
        "web:1.mp4#2": "b",
        "web:1.mp4@1-2.5": "c",
        "web:1.mp4@2.5-": "d",
    }


def test_a_trial_reads_the_first_rows(tmp_path: Path) -> None:
    files(tmp_path, "1.mp4")
    path = jsonl(tmp_path / "a.jsonl", *({"id": i, "video": "1.mp4", "caption": str(i)} for i in range(9)))
    assert [outcome.id for outcome in outcomes(tmp_path, {"path": path, "limit": 3})] == ["a:0", "a:1", "a:2"]


@pytest.mark.parametrize(("value", "expected"), [(3, 3.0), ("3.25", 3.25), ("01:02:03.5", 3723.5), ("", None)])
def test_times(value: Any, expected: float | None) -> None:
    assert seconds(value) == expected


# ---------------------------------------------------------------------------------------------------------------- tars


def test_webdataset_members_are_read_where_they_lie(tmp_path: Path) -> None:
    clips = {name: mp4(count) for name, count in (("a", 3), ("b", 5))}
    tar(
        tmp_path / "s/x-0.tar",
        {
            "a.mp4": clips["a"],
            "a.txt": b"from text",
            "a.json": b'{"caption": "from json", "lang": "en"}',
            "sub/b.v1.mp4": clips["b"],
            "sub/b.json": b'{"caption": "other", "lang": "de"}',
        },
    )
    tar(tmp_path / "s/x-1.tar", {"a.mp4": clips["a"], "c.jpg": b"x", "d.mp4": b"y", "d.json": b"{"})
    found = outcomes(tmp_path, {"path": str(tmp_path / "s"), "name": "wds", "columns": {"meta": ["lang"]}})
    weak = pairs(found, tmp_path)
    assert {id: (pair.caption, dict(pair.meta)) for id, pair in weak.items()} == {
        "wds:x-0/a": ("from text", {"lang": "en"}),
        "wds:x-0/sub/b": ("other", {"lang": "de"}),
        "wds:x-1/a": ("", {"lang": None}),
    }
    assert weak["wds:x-0/a"].video.source == clips["a"]
    assert weak["wds:x-0/sub/b"].video.source == clips["b"]
    assert probe(weak["wds:x-0/sub/b"].video.source).num_frames == 5
    assert reasons(found) == {"wds:row-4": "member", "wds:row-5": "row"}


def test_a_cut_tar_keeps_what_stands_before_the_cut(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar", {"a.mp4": b"1" * 3000, "a.txt": b"one", "b.mp4": b"2" * 30000, "b.txt": b"two"})
    path.write_bytes(path.read_bytes()[:9000])
    found = outcomes(tmp_path, {"path": str(path)})
    assert list(pairs(found, tmp_path)) == ["x:x/a"]
    assert list(reasons(found).values()) == ["tar"]


def test_a_tar_that_shrank_is_named(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar", {"a.mp4": b"1" * 3000, "a.txt": b"one"})
    (outcome,) = outcomes(tmp_path, {"path": str(path)})
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(MediaError, match=r"x\.tar/a\.mp4: the tar ends inside of it") as error:
        MediaStore(tmp_path).weak_pair(outcome.rows[0])
    assert error.value.reason == "truncated"


def test_shards_of_the_project(tmp_path: Path) -> None:
    clips = [mp4(3), mp4(5)]
    with ShardWriter(tmp_path / "shards", task="T2V", source="web", samples_per_shard=1) as writer:
        for i, clip in enumerate(clips):
            writer.write(Pair(Item((Text(f"caption {i}"),)), Item((Video(clip, name=f"{i}.mp4"),))))
    with ShardWriter(tmp_path / "shards", task="T2T", source="words") as writer:
        writer.write(Pair(Item((Text("a"),)), Item((Text("b"),))))
    found = pairs(outcomes(tmp_path, {"path": str(tmp_path / "shards"), "name": "own"}), tmp_path)
    assert {id: pair.caption for id, pair in found.items()} == {
        "own:web_000000_0000": "caption 0",
        "own:web_000001_0000": "caption 1",
    }
    assert [pair.video.source for pair in found.values()] == clips
    assert [pair.video.sha256 for pair in found.values()] == [Video(clip).content_hash() for clip in clips]


def test_stored_frames_are_no_videos(tmp_path: Path) -> None:
    pixels = np.zeros((2, 8, 8, 3), np.uint8)
    frames = Frames(pixels, np.array([0.0, 0.5]), np.array([0, 1]), 2, 2.0)
    presample = Presample(Sampling.uniform(2))
    with ShardWriter(tmp_path / "s", task="T2V", source="web", presample=presample) as writer:
        writer.write(Pair(Item((Text("a"),)), Item((Video(frames, "ab"),))))
    with pytest.raises(InputError, match="stores frames: synthesis needs original videos"):
        outcomes(tmp_path, {"path": str(tmp_path / "s")})


# --------------------------------------------------------------------------------------------------- published layouts


def test_webvid(tmp_path: Path) -> None:
    """`videoid,contentUrl,duration,page_dir,name`; captions shared by two videos are dropped, as in the paper."""
    files(tmp_path, "videos/p1/11.mp4", "videos/22.mp4", "videos/p1/33.mp4", "videos/p1/44.mp4")
    (tmp_path / "results.csv").write_text(
        "videoid,contentUrl,duration,page_dir,name\n"
        '11,u,PT0M9S,p1,"A dog, that ""runs"""\n22,u,PT0M9S,nan,A cat\n33,u,PT0M9S,p1,Sea\n44,u,PT0M9S,p1,Sea\n'
        "55,u,PT0M9S,p1,Lost\n"
    )
    source = {"path": str(tmp_path / "results.csv"), "media": str(tmp_path / "videos"), "name": "webvid"}
    found = outcomes(tmp_path, source)
    assert {id: pair.caption for id, pair in pairs(found, tmp_path).items()} == {
        "webvid:11": 'A dog, that "runs"',
        "webvid:22": "A cat",
    }
    assert reasons(found) == {
        "webvid:row-3": "shared-caption",
        "webvid:row-4": "shared-caption",
        "webvid:row-5": "missing",
    }


def test_internvid_as_clips_and_as_whole_videos(tmp_path: Path) -> None:
    row = {
        "YoutubeID": "a_b-c",
        "Start_timestamp": "00:00:02.500",
        "End_timestamp": "00:01:10.000",
        "Caption": "a man cooks",
        "UMT_Score": 0.4,
        "Aesthetic_Score": 5.0,
    }
    path = jsonl(tmp_path / "flt.jsonl", row)
    files(tmp_path, "clips/a_b-c_00:00:02.500_00:01:10.000.mp4", "whole/a_b-c.mp4")
    (cut,) = pairs(outcomes(tmp_path, {"path": path, "media": str(tmp_path / "clips")}), tmp_path).values()
    assert (cut.id, cut.start_s, cut.end_s) == ("flt:a_b-c_00:00:02.500_00:01:10.000", None, None)
    source = {"path": path, "media": str(tmp_path / "whole"), "media_name": "{YoutubeID}.mp4"}
    (span,) = pairs(outcomes(tmp_path, source), tmp_path).values()
    assert (span.id, span.start_s, span.end_s, span.caption) == (cut.id, 2.5, 70.0, "a man cooks")
    assert span.video.source == tmp_path / "whole/a_b-c.mp4"


def test_pe_video(tmp_path: Path) -> None:
    record = {"video_id": "1", "human_caption": "a bike", "model_caption": "long", "keywords": "bike"}
    clip = mp4(3)
    members = {
        "0001.mp4": clip,
        "0001.json": json.dumps(record).encode(),
        "0002.mp4": b"x",
        "0002.json": json.dumps(record | {"video_id": "2", "human_caption": None}).encode(),
    }
    tar(tmp_path / "pe/train/00.tar", members)
    found = outcomes(tmp_path, {"path": str(tmp_path / "pe"), "kind": "pe_video"})
    (pair,) = pairs(found, tmp_path).values()
    assert (pair.id, pair.caption, pair.video.source) == ("pe:0001", "a bike", clip)
    assert reasons(found) == {"pe:row-2": "no-human-caption"}
    tar(tmp_path / "pe/test/00.tar", members)
    with pytest.raises(InputError, match="the benchmark PEV-K is made of"):
        outcomes(tmp_path, {"path": str(tmp_path / "pe/test"), "kind": "pe_video"})


# ------------------------------------------------------------------------------------------------------------- refusal


def test_kinds_are_told_apart(tmp_path: Path) -> None:
    from gve.synth.inputs import SourceOptions

    (tmp_path / "w.csv").write_text("videoid,contentUrl,duration,page_dir,name\n1,u,P,d,n\n")
    jsonl(tmp_path / "i.jsonl", {"YoutubeID": "a", "Start_timestamp": "0", "End_timestamp": "1", "Caption": "c"})
    jsonl(tmp_path / "l.jsonl", {"video": "a", "caption": "c"})
    tar(tmp_path / "t/x.tar", {"a.mp4": b"x"})
    kinds = {name: guess(SourceOptions(tmp_path / name)) for name in ("w.csv", "i.jsonl", "l.jsonl", "t", "t/x.tar")}
    assert kinds == {
        "w.csv": "webvid",
        "i.jsonl": "internvid",
        "l.jsonl": "list",
        "t": "shards",
        "t/x.tar": "shards",
    }
    assert guess(SourceOptions(tmp_path)) == "folder"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"path": "{root}/none"}, "none does not exist"),
        ({"path": "s3://bucket/x"}, "fetch it first"),
        ({"path": "{root}/a.mp4"}, "is no list"),
        ({"path": "{root}/empty"}, r"no row can be used \(there is none\)"),
        ({"path": "{root}/gone.jsonl"}, r"no row can be used \(missing: .*3\.mp4: no such file"),
        ({"path": "{root}/other.jsonl"}, "which column is the video's path"),
        (
            {"path": "{root}/gone.jsonl", "columns": {"caption": "words"}},
            "has no column 'words': it has video, caption",
        ),
        ({"path": "{root}/gone.jsonl", "media_name": "{nothing}.mp4"}, "is no column"),
        ({"path": "{root}/binary.csv"}, "cannot be read as csv"),
        ({"path": "{root}/binary.parquet"}, "cannot be read as parquet"),
        ({"path": "{root}/empty", "kind": "shards"}, r"holds no \.tar"),
        ({"path": "{root}/empty", "kind": "flder"}, "use one of auto, folder"),
    ],
)
def test_sources_that_cannot_be_used(tmp_path: Path, source: dict[str, Any], said: str) -> None:
    (tmp_path / "empty").mkdir()
    files(tmp_path, "a.mp4")
    jsonl(tmp_path / "gone.jsonl", {"video": "3.mp4", "caption": "c"})
    jsonl(tmp_path / "other.jsonl", {"thing": "3.mp4"})
    for name in ("binary.csv", "binary.parquet"):
        (tmp_path / name).write_bytes(b"\xff\xfe\x00\x81" * 9)
    with pytest.raises(InputError, match=said):
        outcomes(tmp_path, {**source, "path": source["path"].replace("{root}", str(tmp_path))})


def test_two_sources_need_two_names(tmp_path: Path) -> None:
    files(tmp_path, "x/a.mp4", "y/x/a.mp4")
    one, two = {"path": str(tmp_path / "x")}, {"path": str(tmp_path / "y/x")}
    with pytest.raises(InputError, match="two sources have one name"):
        outcomes(tmp_path, one, two)
    found = outcomes(tmp_path, one, {**two, "name": "y"})
    assert [outcome.id for outcome in found] == ["x:a.mp4", "y:a.mp4"]
