"""Readers of published layouts, on tiny files written by hand after the data sets' own documentation."""

from __future__ import annotations

import csv
import io
import json
import shutil
import tarfile
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image as PILImage

from gve.data.mixture import mixture
from gve.data.readers import Dropped, Limited, Reader, ReaderOptions, Row, RowError, open_reader
from gve.data.readers.rows import json_rows
from gve.data.schema import ShardError
from gve.data.shards_cli import main
from gve.data.sources import open_sources
from gve.items import Image, InputError, Pair, Text


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for i in range(12):
            picture = np.full((32, 32, 3), 20 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())
    return path


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def jsonl(path: Path, rows: list[Any]) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def read(name: str, folder: Path, source: str, **options: Any) -> Reader:
    return open_reader(name, ReaderOptions(folder, source, **options))


def outcomes(reader: Reader) -> list[str]:
    """What becomes of each row: the text of a pair's query, or the reason why there is none."""
    return [row.query.text if isinstance(row, Pair) else row.reason for _, row in reader.rows()]


def pairs(reader: Reader) -> list[Pair]:
    return [row for _, row in reader.rows() if isinstance(row, Pair)]


# ------------------------------------------------------------------------------------------------------------- WebVid

WEBVID = '''videoid,contentUrl,duration,page_dir,name
1001,https://x/1001.mp4,PT00H00M10S,000001_000050,"A dog, running on ""sand"""
1002,https://x/1002.mp4,PT00H00M12S,000001_000050,Sunset over the sea
1003,https://x/1003.mp4,PT00H00M12S,000051_000100, Sunset over the sea
1004,https://x/1004.mp4,PT00H00M12S,NaN,A clip without a page
1005,https://x/1005.mp4,PT00H00M12S,000051_000100,Its file is gone
1006,https://x/1006.mp4,PT00H00M12S,../../outside,It climbs
1007,https://x/1007.mp4,PT00H00M12S,000051_000100
'''
MORE = '''videoid,contentUrl,duration,page_dir,name
1001,https://x/1001.mp4,PT00H00M10S,000001_000050,"A dog, running on ""sand"""
2001,https://x/2001.mp4,PT00H00M10S,,A field of wheat
'''
OUTCOMES = [
    'A dog, running on "sand"',
    "shared-caption",
    "shared-caption",
    "A clip without a page",
    "missing",
    "outside",
    "row",
    "repeated-video",
    "A field of wheat",
]


@pytest.fixture
def webvid(tmp_path: Path, clip: Path) -> Path:
    folder = tmp_path / "webvid"
    write(folder / "data/train/partitions/0000.csv", WEBVID)
    write(folder / "data/train/partitions/0001.csv", MORE)
    for name in ("000001_000050/1001", "000001_000050/1002", "000051_000100/1003", "1004", "2001"):
        target = folder / f"videos/{name}.mp4"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, target)
    return folder


def test_webvid_rows(webvid: Path) -> None:
    reader = read("webvid", webvid, "webvid")
    assert outcomes(reader) == OUTCOMES
    assert outcomes(reader) == OUTCOMES, "at every reading"
    first = pairs(reader)[0]
    assert (first.key, first.task, first.source) == ("1001", "T2V", "webvid")
    assert first.target.media[0].source == webvid / "videos/000001_000050/1001.mp4"
    elsewhere = read("webvid", webvid, "webvid", media=webvid / "videos/000001_000050", media_name="{videoid}.mp4")
    assert [pair.key for pair in pairs(elsewhere)] == ["1001"]
    with pytest.raises(ShardError, match="no field of a row: videoid"):
        pairs(read("webvid", webvid, "webvid", media_name="{video}.mp4"))
    with pytest.raises(ShardError, match="lacks the columns videoid"):
        pairs(read("webvid", write(webvid / "other.csv", "id,page_dir,name\n1,2,3\n"), "webvid"))


def test_webvid_becomes_shards(webvid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole command: every row is a sample, left out by a named rule, or rejected with a reason."""
    write(webvid / "videos/2001.mp4", b"no video")
    words = [
        "build",
        "--reader",
        "webvid",
        "--from",
        str(webvid),
        "--source",
        "webvid",
        "--root",
        str(tmp_path / "out"),
    ]
    with pytest.raises(InputError, match="4 bad rows"):
        main(words)
    assert not (tmp_path / "out").exists()
    capsys.readouterr()
    assert main([*words, "--on-bad", "skip", "--json", "--presample", "uniform(4)"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["samples"] == {"webvid": 2}
    assert result["dropped"] == {"shared-caption": 2, "repeated-video": 1}
    assert result["rejected"] == {"missing": 1, "outside": 1, "row": 1, "not-a-video": 1}
    rejects = [json.loads(line) for line in (tmp_path / "out/rejects.jsonl").read_text().splitlines()]
    assert [(reject["row"], reject["reason"]) for reject in rejects] == [
        (5, "missing"),
        (6, "outside"),
        (7, "row"),
        (9, "not-a-video"),
    ]
    source = open_sources(tmp_path / "out")["webvid"]
    assert (source.record.task, source.record.level) == ("T2V", 2)
    assert source.read(0).query.instruction == mixture()["webvid"].instruction == source.record.instruction
    tar = (tmp_path / "out" / source.record.shards[0].file).read_bytes()
    assert b'"provenance": {"listing": "webvid", "row": 1, "id": "1001"}' in tar


def test_a_large_csv_is_streamed(tmp_path: Path) -> None:
    """4,000 rows of 2,000 letters, 8 MB: what is kept are some 100 bytes a row, not the rows."""
    path = tmp_path / "large.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["videoid", "contentUrl", "duration", "page_dir", "name"])
        writer.writerows([i, "u", "d", "p", f"{i // 2 if i < 1000 else i} {'x' * 2000}"] for i in range(4000))
    tracemalloc.start()
    counts = Counter(getattr(row, "reason", "") for _, row in read("webvid", path, "webvid", media=tmp_path).rows())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # 500 captions of two videos each; the rows after them share with none.
    assert counts == {"shared-caption": 1000, "missing": 3000}
    assert peak < 1e6


def test_a_limit_is_exact_drawn_and_kept(webvid: Path, tmp_path: Path) -> None:
    names = [f"q{i}" for i in range(300)]
    jsonl(tmp_path / "beir/corpus.jsonl", [{"_id": f"d{i}", "title": "", "text": f"document {i}"} for i in range(300)])
    jsonl(tmp_path / "beir/queries.jsonl", [{"_id": name, "text": f"question {name}"} for name in names])
    lines = [f"q{i}\td{i}\t1" for i in range(300)]
    write(tmp_path / "beir/qrels/train.tsv", "\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n")

    def drawn(seed: int) -> list[str]:
        return [pair.key for pair in pairs(Limited(read("beir", tmp_path / "beir", "msmarco"), 100, seed))]

    first = drawn(1)
    assert len(first) == 100
    assert first == sorted(first, key=names.index), "in the order of the file"
    assert drawn(1) == first != drawn(2)
    # From all of it: each third of the file gives 33 of 100 on average, sd 3.9 (hypergeometric); 5 sd are allowed.
    thirds = Counter(int(key[1:]) // 100 for key in first)
    assert all(14 <= thirds[part] <= 53 for part in range(3))
    assert len(pairs(Limited(read("webvid", webvid, "webvid"), 9, 1))) == 3, "no more than there are"
    # Rows that cannot be used do not count: 2 of the 3 usable ones.
    two = Counter(outcomes(Limited(read("webvid", webvid, "webvid"), 2, 1)))
    assert two["over-limit"] == 1
    assert two["missing"] == two["outside"] == 1


# ------------------------------------------------------------------------------------------- InternVid, VAST, PE-Video


def test_internvid_rows(tmp_path: Path, clip: Path) -> None:
    def row(video: str, start: str, caption: str = "a clip") -> dict[str, Any]:
        times = {"Start_timestamp": f"00:00:{start}.000", "End_timestamp": f"00:00:{start}.900"}
        return {"YoutubeID": video, **times, "Caption": caption, "UMT_Score": 0.4, "Aesthetic_Score": 4.5}

    jsonl(
        tmp_path / "InternVid-10M-flt.jsonl",
        [row("-abc", "01", "one"), row("-abc", "02", "two"), row("bad", "01"), row("-abc", "03"), {"YoutubeID": "x"}],
    )
    jsonl(tmp_path / "InternVid-10M-div.jsonl", [row("other", "01", "not of FLT")])
    for start in ("01", "02", "03"):
        shutil.copy(clip, tmp_path / f"-abc_00:00:{start}.000_00:00:{start}.900.mp4")
    low = write(tmp_path / "low.txt", "bad\n-abc_00:00:03.000_00:00:03.900\n")
    reader = read("internvid", tmp_path, "internvid_flt", drop_list=low)
    assert outcomes(reader) == ["one", "two", "low-quality", "low-quality", "row"]
    assert [pair.key for pair in pairs(reader)] == [f"-abc_00:00:{s}.000_00:00:{s}.900" for s in ("01", "02")]
    assert outcomes(read("internvid", tmp_path, "internvid_flt"))[2] == "missing", "without the list"
    with pytest.raises(ShardError, match="drop list"):
        read("internvid", tmp_path, "internvid_flt", drop_list=tmp_path / "none.txt")


def test_vast_takes_one_of_several_captions(tmp_path: Path, clip: Path) -> None:
    captions = [f"caption {j}" for j in range(4)]
    rows: list[Any] = [{"clip_id": f"c{i}", "url": "u", "vision_cap": captions} for i in range(40)]
    rows += [
        {"clip_id": "one", "vision_cap": "alone"},
        {"clip_id": "none", "vision_cap": [" ", None]},
        {"clip_id": "c"},
    ]
    write(tmp_path / "vast.json", json.dumps(rows, indent=1))
    (tmp_path / "videos").mkdir()
    for row in rows[:-1]:
        shutil.copy(clip, tmp_path / f"videos/{row['clip_id']}.mp4")
    found = outcomes(read("vast", tmp_path, "vast"))
    assert found[40:] == ["alone", "empty-text", "row"]
    assert found == outcomes(read("vast", tmp_path, "vast"))
    assert found != outcomes(read("vast", tmp_path, "vast", seed=1))
    # 40 draws among 4: 10 each on average, sd 2.7; each within 3.6 sd.
    assert all(1 <= count <= 20 for count in Counter(found[:40]).values())
    assert set(found[:40]) == set(captions)


def test_pe_video_takes_human_captions_of_train(tmp_path: Path, clip: Path) -> None:
    def tar(path: Path, members: dict[str, bytes]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as file:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))

    def about(video: int, caption: str | None) -> bytes:
        return json.dumps({"video_id": video, "human_caption": caption, "model_caption": "by a model"}).encode()

    data = clip.read_bytes()
    first = {
        "0007.mp4": data,
        "0007.json": about(7, "a human wrote this"),
        "0008.mp4": data,
        "0008.json": about(8, None),
    }
    tar(tmp_path / "train/000.tar", first | {"9.json": about(9, "json first"), "9.mp4": data})
    tar(tmp_path / "train/001.tar", {"5.mp4": data, "5.json": about(6, "swapped"), "4.json": about(4, "no clip")})
    tar(tmp_path / "test/000.tar", first)
    whole = (tmp_path / "train/000.tar").read_bytes()
    write(tmp_path / "train/002.tar", whole[: len(data) // 2])
    reader = read("pe_video", tmp_path, "pe_video")
    assert outcomes(reader) == ["a human wrote this", "no-human-caption", "json first", "id", "member", "tar"]
    pair = pairs(reader)[0]
    assert pair.target.media[0].source == data
    assert pair.target.media[0].name == "000.tar/0007.mp4"
    without = [row for _, row in reader.rows(media=False)]
    assert [type(row) for row in without[:5]] == [Pair, Dropped, Pair, RowError, RowError]
    with pytest.raises(ShardError, match="test split"):
        read("pe_video", tmp_path / "test", "pe_video")
    words = ["build", str(tmp_path), str(tmp_path / "out"), "--reader", "pe_video", "--source", "pe_video"]
    assert main([*words, "--on-bad", "skip"]) == 0
    assert open_sources(tmp_path / "out")["pe_video"].read(1).target.media[0].source == data


# ------------------------------------------------------------------------------------------------------ BEIR and M-BEIR


def test_beir_pairs(tmp_path: Path) -> None:
    corpus = [{"_id": "d1", "title": "Title", "text": "Text. "}, {"_id": "d2", "title": "", "text": "No title"}]
    jsonl(tmp_path / "corpus.jsonl", [*corpus, {"_id": "d3", "text": "third"}])
    queries = [{"_id": f"q{i}", "text": f"question {i}"} for i in range(5)]
    jsonl(tmp_path / "queries.jsonl", [*queries, {"_id": "q9"}])
    judged = ["q0\td1\t1", "q1\td2\t1", "q2\td1\t1", "q2\td3\t1", "q3\td1\t0", "q4\tgone\t1"]
    write(tmp_path / "qrels/train.tsv", "\n".join(["query-id\tcorpus-id\tscore", *judged]) + "\n")
    reader = read("beir", tmp_path, "hotpotqa")
    assert outcomes(reader) == [
        "question 0",
        "question 1",
        "question 2",
        "no-relevant-document",
        "no-candidate",
        "row",
    ]
    assert [pair.target.text for pair in pairs(reader)][:2] == ["Title Text.", "No title"]
    assert {pairs(read("beir", tmp_path, "hotpotqa", seed=seed))[2].target.text for seed in range(8)} == {
        "Title Text.",
        "third",
    }, "one of several positives, by the seed"
    assert pairs(reader) == pairs(reader)
    with pytest.raises(ShardError, match="serves T2T, not T2V"):
        read("beir", tmp_path, "x", task="T2V")
    write(tmp_path / "qrels/train.tsv", "q0 d1 1\n")
    with pytest.raises(ShardError, match=r"train.tsv, line 1"):
        pairs(read("beir", tmp_path, "x"))


@pytest.fixture
def mbeir(tmp_path: Path) -> Path:
    folder = tmp_path / "M-BEIR"
    for name in ("a", "b", "c"):
        (folder / "mbeir_images").mkdir(parents=True, exist_ok=True)
        PILImage.fromarray(np.full((8, 8, 3), ord(name), np.uint8)).save(folder / f"mbeir_images/{name}.jpg")

    def query(qid: str, text: str | None, image: str | None, modality: str, pos: list[str], neg: list[str]) -> dict:
        content = {"query_txt": text, "query_img_path": image, "query_modality": modality, "query_src_content": "{}"}
        return {"qid": qid, **content, "pos_cand_list": pos, "neg_cand_list": neg}

    def candidate(did: str, text: str | None, image: str | None, modality: str) -> dict:
        return {"did": did, "txt": text, "img_path": image, "modality": modality, "src_content": None}

    a, b, c = (f"mbeir_images/{name}.jpg" for name in "abc")
    jsonl(
        folder / "query/union_train/mbeir_union_up_train.jsonl",
        [
            query("5:1", "which dog is this? ", a, "image,text", ["5:11", "5:10"], ["5:12", "5:10", "5:13", "5:14"]),
            query("5:2", "which tree?", b, "image,text", ["5:12"], []),
            query("5:3", None, a, "image,text", ["5:10"], []),
            query("5:4", "whose file?", "mbeir_images/gone.jpg", "image,text", ["5:10"], []),
            query("5:5", "no candidate?", a, "image,text", ["5:99"], []),
            query("9:1", "another data set", a, "image,text", ["9:1"], []),
            query("5:6", "only text", None, "text", ["5:10"], []),
        ],
    )
    jsonl(
        folder / "cand_pool/global/mbeir_union_train_cand_pool.jsonl",
        [
            candidate("5:10", "a spaniel", None, "text"),
            candidate("5:11", "a spaniel, seen", b, "image,text"),
            candidate("5:12", "an oak, seen", c, "image,text"),
            candidate("5:13", "a birch", None, "text"),
        ],
    )
    jsonl(folder / "cand_pool/local/mbeir_oven_task6_cand_pool.jsonl", [candidate("5:14", "a cat", None, "text")])
    return folder


def test_mbeir_pairs_by_task(mbeir: Path) -> None:
    text = read("mbeir", mbeir, "oven_ti2t", task="TI2T", negatives=2)
    others = ["missing", "no-candidate", "other-task", "other-task"]
    assert outcomes(text) == ["which dog is this?", "other-task", "", *others]
    pair = pairs(text)[0]
    assert [type(part) for part in pair.query.parts] == [Image, Text]
    assert pair.query.media[0].source == mbeir / "mbeir_images/a.jpg"
    assert pair.target.text == "a spaniel"
    # Of four negatives three are texts; the positive among them is one too, as the data set has it.
    assert len(pair.negatives) == 2
    assert {negative.text for negative in pair.negatives} <= {"a spaniel", "a birch", "a cat"}
    both = read("mbeir", mbeir, "oven_ti2ti", task="TI2TI", negatives=1)
    assert outcomes(both) == ["which dog is this?", "which tree?", "other-task", *others]
    assert [pair.target.modality for pair in pairs(both)] == ["TI", "TI"]
    assert [negative.text for negative in pairs(both)[0].negatives] == ["an oak, seen"]
    with pytest.raises(ShardError, match="first word must be one of visualnews"):
        read("mbeir", mbeir, "remuq", task="TI2T")
    with pytest.raises(ShardError, match="not T2V"):
        read("mbeir", mbeir, "oven", task="T2V")


def test_mbeir_becomes_shards(mbeir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Task, instruction and negatives come from the mixture; an empty query text is a reject."""
    words = [
        "build",
        str(mbeir),
        str(tmp_path / "out"),
        "--reader",
        "mbeir",
        "--source",
        "oven_ti2t",
        "--on-bad",
        "skip",
    ]
    assert main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["samples"] == {"oven_ti2t": 1}
    assert result["rejected"] == {"empty-text": 1, "missing": 1, "no-candidate": 1}
    source = open_sources(tmp_path / "out")["oven_ti2t"]
    assert (source.record.task, len(source.read(0).negatives)) == ("TI2T", mixture()["oven_ti2t"].negatives)
    assert source.read(0).query.instruction == mixture()["oven_ti2t"].instruction


# -------------------------------------------------------------------------------------------------- files and commands


@pytest.mark.parametrize("form", ["array", "lines"])
def test_json_is_read_row_by_row(form: str, tmp_path: Path) -> None:
    """Values that lie across the bounds of the 64 KiB blocks, numbers and brackets in strings."""
    rows = [{"id": i, "text": "[x], {y} " * (i % 50), "n": 1.5} for i in range(3000)] + [7, 8]
    text = json.dumps(rows, indent=2) if form == "array" else "\n".join(map(json.dumps, rows)) + "\n\n"
    path = write(tmp_path / "rows.json", "\ufeff" + text)
    assert list(json_rows(path)) == rows
    write(path, text[: len(text) // 2])
    if form == "array":
        with pytest.raises(ShardError, match="cut off or damaged"):
            list(json_rows(path))
    else:
        assert isinstance(list(json_rows(path))[-1], RowError)


def test_real_annotations(real: Path, tmp_path: Path, clip: Path) -> None:
    """Real captions in the two forms that real files come in: a JSON array (FashionIQ) and jsonl (DREAM-1K)."""
    fashion = list(json_rows(real / "annotations/train_sources/fashioniq_cap.dress.val.excerpt.json"))
    assert len(fashion) == 40
    assert fashion[0]["captions"] == ["is shiny and silver with shorter sleeves", "fit and flare"]
    dream = list(json_rows(real / "annotations/dream1k/DREAM-1k.jsonl"))
    assert len(dream) == 1000
    # As WebVid: 6,298 events, of which 37 strings belong to more than one clip (data_formats of the benchmark).
    path = tmp_path / "dream.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["videoid", "page_dir", "name"])
        for row in dream:
            writer.writerows([f"{row['vid']}", "", event] for event in row["extra_info"]["events"])
    found = Counter(getattr(row, "reason", "") for _, row in read("webvid", path, "webvid", media=tmp_path).rows())
    owners: dict[str, set[int]] = {}
    for row in dream:
        for event in row["extra_info"]["events"]:
            owners.setdefault(event.strip(), set()).add(row["vid"])
    shared = {event for event, videos in owners.items() if len(videos) > 1}
    assert len(shared) == 37
    rows = sum(event.strip() in shared for row in dream for event in row["extra_info"]["events"])
    assert found["shared-caption"] == rows


def test_bad_words_are_one_line(webvid: Path, tmp_path: Path) -> None:
    build = ["build", str(webvid), str(tmp_path / "out")]
    for words, message in (
        ([*build, "--reader", "webvid"], "name the training source by --source"),
        ([*build, "--reader", "webvid", "--source", "mine", "--limit", "3b"], "no source of `gve shards mixture`"),
        ([*build, "--reader", "webvid", "--source", "mine", "--limit", "few"], "give a number of rows, 3b or 7b"),
        ([*build, "--reader", "webvid", "--source", "mine", "--limit", "0"], "use 1 or more"),
        ([*build, "--reader", "vast", "--source", "vast"], r"holds no \*.jsonl or \*.json"),
        ([*build, "--reader", "webvid", "--source", "mine", "--media", "none"], "give the folder of the clips"),
        (["build", "--from", "absent", "--root", "out", "--reader", "beir", "--source", "x"], "absent does not exist"),
        (["build", "only"], "LISTING OUT, or --from DIR --root OUT"),
    ):
        with pytest.raises(InputError, match=message):
            main(words)
    assert not (tmp_path / "out").exists()


def test_nothing_left_says_why(tmp_path: Path) -> None:
    path = write(tmp_path / "w.csv", "videoid,page_dir,name\n1,,same\n2,,same\n")
    with pytest.raises(ShardError, match=r"no row is left to write \(left out: 2 shared-caption\)"):
        main(["build", str(path), str(tmp_path / "out"), "--reader", "webvid", "--source", "webvid"])
    rows: list[Row] = [row for _, row in read("webvid", path, "webvid").rows()]
    assert rows == [Dropped("shared-caption")] * 2
