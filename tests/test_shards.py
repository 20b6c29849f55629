"""Shards: whole or absent, readable by the stock reader, refused when they do not match."""

from __future__ import annotations

import hashlib
import http.server
import json
import multiprocessing
import os
import pickle
import re
import signal
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest
import webdataset
from PIL import Image as PILImage

from gve.data.build import BadRows, BuildOptions, build, check, stats
from gve.data.manifest import Manifest, Presample
from gve.data.schema import ShardError, decode_sample, encode_sample
from gve.data.shards import OFFSET, SIZE, ShardIndex, ShardWriter, split_sample, tar_members
from gve.data.shards_cli import main
from gve.data.sources import RemoteRoot, open_root, open_sources
from gve.items import Frames, Image, InputError, Item, Pair, Text, Video
from gve.video import Sampling, decode, decode_image


def pixels(seed: int, height: int = 6, width: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def frames(count: int = 4) -> Frames:
    indices = np.array([0, 3, 3, 9][:count], np.int64)
    smooth = np.stack([np.full((8, 8, 3), 40 * i, np.uint8) for i in (1, 2, 2, 5)][:count])
    return Frames(smooth, indices / 5.0, indices, 10, 5.0)


def pair(i: int) -> Pair:
    negatives = tuple(Item.of(image=pixels(100 * i + j + 1)) for j in range(i % 3))
    return Pair(Item.of(f"caption {i}: ä <|im_end|>"), Item.of(image=pixels(i)), negatives)


def write(root: Path, count: int = 8, source: str = "web", **options) -> None:
    with ShardWriter(root, task="T2I", source=source, samples_per_shard=3, instruction="find it", **options) as writer:
        for i in range(count):
            writer.write(pair(i), {"row": i})


def mp4(path: Path, count: int = 12, size: int = 32) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for i in range(count):
            picture = np.full((size, size, 3), (20 * i, 255 - 20 * i, 128), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())
    return path


def everything_in(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


# ----------------------------------------------------------------------------------------------------- writing, reading


def test_pairs_come_back_as_written(tmp_path: Path) -> None:
    write(tmp_path)
    source = open_sources(tmp_path)["web"]
    assert len(source) == 8
    for i in (7, 0, 4):
        read = source.read(i)
        assert (read.key, read.source, read.task) == (f"web_{i // 3:06d}_{i % 3:04d}", "web", "T2I")
        assert read.key == source.key(i)
        assert read.query == Item.of(f"caption {i}: ä <|im_end|>", instruction="find it")
        assert np.array_equal(decode_image(read.target.media[0].source), pixels(i))
        assert len(read.negatives) == i % 3
        for j, negative in enumerate(read.negatives):
            assert np.array_equal(decode_image(negative.media[0].source), pixels(100 * i + j + 1))
    with pytest.raises(IndexError):
        source.read(8)


def test_stock_webdataset_reads_every_shard(tmp_path: Path) -> None:
    write(tmp_path)
    source = open_sources(tmp_path)["web"]
    urls = [str(tmp_path / shard.file) for shard in source.record.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [source.key(i) for i in range(8)]
    for i, sample in enumerate(samples):
        members = {name: data for name, data in sample.items() if not name.startswith("__")}
        assert set(members) == {"json", "target_0.png"} | {f"negative{j}_0.png" for j in range(i % 3)}
        assert decode_sample(members).query == source.read(i).query


def test_index_is_40_bytes_a_sample_and_points_at_whole_samples(tmp_path: Path) -> None:
    write(tmp_path)
    source = open_sources(tmp_path)["web"]
    assert isinstance(source.index, np.memmap)
    assert source.index.nbytes == 8 * 40
    tar = (tmp_path / source.record.shards[0].file).read_bytes()
    # Three samples end to end from the first byte, then the end mark.
    assert source.index[:3, OFFSET].tolist() == [0, *np.cumsum(source.index[:2, SIZE]).tolist()]
    first = tar[: int(source.index[0, SIZE])]
    assert [name for name, *_ in tar_members(first, "t")] == ["web_000000_0000.json", "web_000000_0000.target_0.png"]
    by_hand = int.from_bytes(hashlib.sha256(first).digest()[:8], "big")
    ids = [int(item.content_hash()[:16], 16) for item in (source.read(0).query, source.read(0).target)]
    assert source.index[0, 2:].tolist() == [by_hand, *ids]
    # The instruction is no content.
    assert ids[0] == int(Item.of("caption 0: ä <|im_end|>").content_hash()[:16], 16)
    assert len(pickle.dumps(source)) < 3000


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a")
    time.sleep(1.1)  # tar keeps whole seconds
    write(tmp_path / "b")
    assert (tmp_path / "a/manifest.json").read_bytes() == (tmp_path / "b/manifest.json").read_bytes()


def test_several_sources_share_a_manifest(tmp_path: Path) -> None:
    write(tmp_path, source="web")
    write(tmp_path, source="news", count=2)
    threads = [threading.Thread(target=write, args=(tmp_path, 1, f"extra_{i}")) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sources = open_sources(tmp_path)
    assert list(sources) == ["extra_0", "extra_1", "extra_2", "extra_3", "news", "web"]
    with pytest.raises(ShardError, match="has a source web already"):
        write(tmp_path, source="web")
    write(tmp_path, source="web", count=2, replace=True)
    assert len(open_sources(tmp_path)["web"]) == 2
    assert check(tmp_path) == [], "the old shards are gone"
    numbers = stats(tmp_path)
    assert (numbers["samples"], numbers["tasks"], numbers["levels"]) == (8, {"T2I": 8}, {"1": 8})


def test_presampled_videos_keep_their_frames_and_times(tmp_path: Path) -> None:
    policy = Presample(Sampling.uniform(4), jpeg_quality=90)
    clip = Video(frames(), sha256="ab" * 32)
    with ShardWriter(tmp_path, task="T2V", source="clips", presample=policy) as writer:
        writer.write(Pair(Item.of("text"), Item((clip,))))
        with pytest.raises(ShardError, match="takes videos as Frames"):
            writer.write(Pair(Item.of("text"), Item.of(video=b"bytes of a file")))
    source = open_sources(tmp_path)["clips"]
    assert source.record.presample == policy
    read = source.read(0).target.media[0]
    assert isinstance(read.source, Frames)
    assert np.abs(read.source.pixels.astype(int) - frames().pixels).max() <= 2  # JPEG of flat colour
    assert np.array_equal(read.source.indices, [0, 3, 3, 9])
    assert np.array_equal(read.source.times_s, frames().times_s)
    assert (read.source.num_frames, read.source.native_fps) == (10, 5.0)
    # Repeated frames are stored once; the content is that of the stored frames, and known without decoding them.
    tar = (tmp_path / source.record.shards[0].file).read_bytes()
    members = split_sample(tar[: int(source.index[0, SIZE])], "t")
    assert sorted(members) == ["json", "target_0_f00.jpg", "target_0_f01.jpg", "target_0_f02.jpg"]
    assert json.loads(members["json"])["target"]["parts"][0]["sha256"] == "ab" * 32
    assert read.sha256 == decode_sample(members, pixels=False).target.media[0].sha256 != "ab" * 32


def test_presample_serves_equal_or_fewer_frames_and_pixels() -> None:
    stored = Presample(Sampling.uniform(8), max_frame_px=156_800)
    assert stored.serves(Sampling.uniform(8), 156_800)
    assert stored.serves(Sampling.uniform(4), 100)
    assert not stored.serves(Sampling.uniform(16), 100)
    assert not stored.serves(Sampling.uniform(8), 156_801)
    assert not stored.serves(Sampling.every(1.0, 8), 100)
    assert Presample(Sampling.every(1.0, 8)).serves(Sampling.every(1.0, 8), 10**9)


def test_shards_are_read_over_http_by_ranges(tmp_path: Path) -> None:
    write(tmp_path)
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self, body: bool) -> None:
            data = (tmp_path / self.path.lstrip("/")).read_bytes()
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if wanted:
                first, last = int(wanted[1]), min(int(wanted[2]), len(data) - 1)
                asked.append(f"{Path(self.path).suffix} {last - first + 1}")
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
                data = data[first : last + 1]
            else:
                self.send_response(200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body:
                self.wfile.write(data)

        def do_GET(self) -> None:
            self.answer(True)

        def do_HEAD(self) -> None:
            self.answer(False)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        source = open_sources(f"http://127.0.0.1:{server.server_port}")["web"]
        assert isinstance(source.root, RemoteRoot)
        local = open_sources(tmp_path)["web"]
        assert source.read(5).query == local.read(5).query
        assert asked == [f".tar {int(local.index[5, SIZE])}"], "one range request a sample"
    finally:
        server.shutdown()
        server.server_close()


# ------------------------------------------------------------------------------------------------- nothing half-written


def write_and_fail(root: Path, end: Pair | BaseException) -> None:
    """Two whole shards and a started one, then a pair of the wrong kind or an exception."""
    with ShardWriter(root, task="T2I", source="web", samples_per_shard=2) as writer:
        for i in range(5):
            writer.write(pair(i))
        if isinstance(end, BaseException):
            raise end
        writer.write(end)


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    root = tmp_path / "new" / "shards"
    with pytest.raises(InputError, match="target holds T, task T2I needs I"):
        write_and_fail(root, Pair(Item.of("a"), Item.of("b")))
    assert list(tmp_path.iterdir()) == []
    write(root, 2, "old")
    before = everything_in(root)
    with pytest.raises(KeyboardInterrupt):
        write_and_fail(root, KeyboardInterrupt())
    with pytest.raises(ShardError, match="no sample"), ShardWriter(root, task="T2I", source="web"):
        pass
    assert everything_in(root) == before
    assert list(open_sources(root)) == ["old"]


def test_what_a_killed_writer_leaves_is_invisible_and_removed(tmp_path: Path) -> None:
    def die() -> None:
        writer = ShardWriter(tmp_path, task="T2I", source="web")
        writer.write(pair(0))
        os.kill(os.getpid(), signal.SIGKILL)

    write(tmp_path, 2, "old")
    child = multiprocessing.get_context("fork").Process(target=die)
    child.start()
    child.join(30)
    assert child.exitcode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".staging-*"))) == 1
    assert list(open_sources(tmp_path)) == ["old"]
    assert "interrupted build" in check(tmp_path)[0]
    write(tmp_path, 2, "web")
    assert not list(tmp_path.glob(".staging-*"))
    assert check(tmp_path) == []


def test_unwritable_folders_and_bad_names_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ShardError, match="cannot write to"):
            write(root)
    for name in ("Web", "a.b", "a-b", "", "x" * 41):
        with pytest.raises(ShardError, match="source name"):
            write(tmp_path, source=name)
    with pytest.raises(InputError, match="unknown task"):
        ShardWriter(tmp_path, task="V2X", source="web")
    assert everything_in(tmp_path) == ["file"]


def test_a_member_name_never_asks_a_reader_to_unpickle(tmp_path: Path) -> None:
    for name in ("x.pkl", "x.pyd", "x.pth", "x.npz", "x.json", "x.gz", "x.tar.gz", "x"):
        item = Item((Image(b"content", name=name),))
        members = encode_sample(Pair(Item.of("a"), item, source="s", task="T2I"), "s_000000_0000", 1)
        assert list(members) == ["json", "target_0.bin"]


# --------------------------------------------------------------------------------------- shards that do not match


def shard_of(root: Path, number: int = 0) -> Path:
    return root / f"level1/T2I/web-{number:06d}.tar"


def test_cut_and_missing_shards_are_refused_at_opening(tmp_path: Path) -> None:
    write(tmp_path)
    whole = shard_of(tmp_path).read_bytes()
    for cut in (len(whole) - 512, 1000, 0):
        shard_of(tmp_path).write_bytes(whole[:cut])
        with pytest.raises(ShardError, match=f"has {cut} bytes, the manifest says {len(whole)}"):
            open_sources(tmp_path)
        assert any("web-000000.tar" in problem for problem in check(tmp_path))
    shard_of(tmp_path).unlink()
    with pytest.raises(ShardError, match="cannot be read"):
        open_sources(tmp_path)


def test_a_shard_cut_between_samples_is_no_shorter_shard(tmp_path: Path) -> None:
    """Where webdataset and tarfile see a smaller shard that is well."""
    write(tmp_path)
    source = open_sources(tmp_path)["web"]
    cut = tmp_path / "cut.tar"
    cut.write_bytes(shard_of(tmp_path).read_bytes()[: int(source.index[2, OFFSET])])
    assert len(list(webdataset.WebDataset(str(cut), shardshuffle=False))) == 2
    with pytest.raises(ShardError, match="cut off"):
        ShardIndex.scan(cut, "web", 0)


def test_changed_bytes_of_the_same_size_are_found(tmp_path: Path) -> None:
    write(tmp_path)
    data = bytearray(shard_of(tmp_path, 1).read_bytes())
    place = data.index(b"caption 4")
    data[place] ^= 1
    shard_of(tmp_path, 1).write_bytes(data)
    source = open_sources(tmp_path)["web"]
    assert source.read(3).key == "web_000001_0000"
    with pytest.raises(ShardError, match="web_000001_0001: its bytes are not the ones indexed"):
        source.read(4)
    assert len(check(tmp_path)) == 3  # manifest, index file, combined index


def test_indexes_of_another_build_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    write(tmp_path / "other", count=7)
    (tmp_path / "level1/T2I/web.index.npy").write_bytes((tmp_path / "other/level1/T2I/web.index.npy").read_bytes())
    with pytest.raises(ShardError, match="does not match the manifest"):
        open_sources(tmp_path)


def test_other_schema_versions_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    manifest = tmp_path / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"schema": 1', '"schema": 2'))
    with pytest.raises(ShardError, match="schema version 2, this code reads 1"):
        open_sources(tmp_path)
    for damaged in ("{", "[]", '{"schema": 1}', text.replace('"count"', '"rows"')):
        manifest.write_text(damaged)
        with pytest.raises(ShardError, match="no shard manifest"):
            open_sources(tmp_path)
    manifest.write_text('{"schema": 1, "sources": []}')
    with pytest.raises(ShardError, match="lists no source"):
        open_sources(tmp_path)
    members = encode_sample(Pair(Item.of("a"), Item.of("b"), source="s", task="T2T"), "s_000000_0000", 1)
    members["json"] = members["json"].replace(b'"schema": 1', b'"schema": 2')
    with pytest.raises(ShardError, match="schema version 2"):
        decode_sample(members)


def test_samples_hold_exactly_what_their_json_names() -> None:
    members = encode_sample(Pair(Item.of("a"), Item.of(image=pixels(0)), source="s", task="T2I"), "s_000000_0000", 1)
    decode_sample(members)
    with pytest.raises(ShardError, match=r"members its json does not name: \['txt'\]"):
        decode_sample({**members, "txt": b""})
    with pytest.raises(ShardError, match=r"lacks the members \['target_0.png'\]"):
        decode_sample({"json": members["json"]})
    with pytest.raises(ShardError, match="not of schema 1"):
        decode_sample({"json": b"{}"})


def test_only_plain_addresses_are_opened(tmp_path: Path) -> None:
    for address in ("pipe:cat x", "gs://bucket/x", "ssh://host/x", "memory://x"):
        with pytest.raises(ShardError, match="refused"):
            open_root(address)
    with pytest.raises(ShardError, match="holds no manifest"):
        open_sources(tmp_path)
    write(tmp_path)
    assert len(open_sources(f"file://{tmp_path}")["web"]) == 8


# ----------------------------------------------------------------------------------------------------------- build


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "files"
    folder.mkdir()
    mp4(folder / "a.mp4")
    mp4(folder / "one.mp4", count=1)
    PILImage.fromarray(pixels(0, 20, 30)).save(folder / "a.png")
    PILImage.fromarray(pixels(0, 1, 1)).save(folder / "dot.png")
    (folder / "cut.mp4").write_bytes((folder / "a.mp4").read_bytes()[:900])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "noise.png").write_bytes(b"\x89PNG\r\n\x1a\nnoise")
    return folder


def listing(folder: Path, rows: list, name: str = "my list.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


GOOD = [
    {"query": {"text": "a sweep"}, "target": {"video": "a.mp4"}},
    {"query": {"text": "noise", "image": "a.png"}, "target": {"video": "a.mp4"}, "instruction": "own words"},
    {"query": {"text": "a sweep"}, "target": {"video": "a.mp4"}, "negatives": [{"video": "a.mp4"}], "source": "extra"},
    {"query": {"parts": [{"text": "see"}, {"image": "a.png"}]}, "target": {"text": "noise"}},
]
BAD = {
    "row": [
        "{\n",
        {"query": {"text": "x"}},
        {"query": {"txt": "x"}, "target": {"text": "y"}},
        {"query": 1, "target": {}},
    ],
    "empty-text": [{"query": {"text": " "}, "target": {"text": "y"}}],
    "empty-item": [{"query": {}, "target": {"text": "y"}}],
    "too-long": [{"query": {"text": "word " * 100_000}, "target": {"text": "y"}}],
    "unicode": [{"query": {"text": "\ud800"}, "target": {"text": "y"}}],
    "missing": [{"query": {"text": "x"}, "target": {"video": "none.mp4"}}],
    "too-few-frames": [{"query": {"text": "x"}, "target": {"video": "one.mp4"}}],
    "too-small": [{"query": {"text": "x"}, "target": {"image": "dot.png"}}],
    "task": [
        {"query": {"text": "x"}, "target": {"video": "a.mp4"}, "task": "T2I"},
        {"query": {"video": "a.mp4"}, "target": {"text": "y"}},
        {"query": {"text": "x"}, "target": {"text": "y"}, "negatives": [{"image": "a.png"}]},
    ],
}
DAMAGED = [{"query": {"text": "x"}, "target": {"video": name}} for name in ("cut.mp4", "empty.mp4")] + [
    {"query": {"text": "x"}, "target": {"image": "noise.png"}}
]


def test_build_from_jsonl(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = build(listing(files, GOOD), out, BuildOptions(instruction="find", jobs=2))
    assert result.samples == {"my_list_t2v": 1, "my_list_ti2v": 1, "my_list_ti2t": 1, "extra": 1}
    sources = open_sources(out)
    assert {s.record.task: s.record.level for s in sources.values()} == {"T2V": 2, "TI2V": 3, "TI2T": 2}
    assert sources["my_list_t2v"].read(0).query == Item.of("a sweep", instruction="find")
    composed = sources["my_list_ti2v"].read(0)
    assert [type(part) for part in composed.query.parts] == [Image, Text]
    assert composed.query.instruction == "own words"
    assert composed.target.media[0].source == (files / "a.mp4").read_bytes()
    assert composed.target.media[0].sha256 == hashlib.sha256((files / "a.mp4").read_bytes()).hexdigest()
    assert [type(part) for part in sources["my_list_ti2t"].read(0).query.parts] == [Text, Image], "as listed"
    assert check(out) == []


def test_build_from_csv(files: Path, tmp_path: Path) -> None:
    path = listing(files, ['video,caption\n"a.mp4","a sweep, of colour"\n'], "clips.csv")
    build(path, tmp_path / "out", BuildOptions())
    assert open_sources(tmp_path / "out")["clips"].read(0).query.text == "a sweep, of colour"
    path = listing(files, ["query_image,query_text,target_text\na.png,what,noise\n"], "other.csv")
    build(path, tmp_path / "out", BuildOptions())
    assert open_sources(tmp_path / "out")["other"].record.task == "TI2T"


def test_bad_rows_refuse_the_build_and_leave_nothing(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    bad = [row for rows in BAD.values() for row in rows] + DAMAGED
    path = listing(files, [GOOD[0], *bad, GOOD[1]])
    with pytest.raises(BadRows) as caught:
        build(path, tmp_path / "out", BuildOptions())
    assert len(caught.value.lines) == len(bad), caught.value.lines
    assert not any("\n" in line for line in caught.value.lines)
    assert caught.value.lines[0].startswith("row 2: no JSON")
    assert not (tmp_path / "out").exists()
    # The command says the same and ends with InputError, which `gve` turns into exit 2.
    with pytest.raises(InputError, match=f"{len(bad)} bad rows"):
        main(["build", str(path), str(tmp_path / "out")])
    assert len(capsys.readouterr().err.splitlines()) == len(bad)


def test_bad_rows_are_skipped_and_accounted_for(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = [GOOD[0], *[row for rows in BAD.values() for row in rows], *DAMAGED, GOOD[2]]
    code = main(["build", str(listing(files, rows)), str(tmp_path / "out"), "--on-bad", "skip", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert code == 0
    assert result["samples"] == {"my_list_t2v": 1, "extra": 1}
    assert {reason: result["rejected"][reason] for reason in BAD} == {reason: len(BAD[reason]) for reason in BAD}
    rejects = [json.loads(line) for line in (tmp_path / "out/rejects.jsonl").read_text().splitlines()]
    assert [reject["row"] for reject in rejects] == list(range(2, len(rows)))
    assert sum(result["rejected"].values()) == len(rejects)
    # Every reject names its reason, damaged files the decoder's.
    assert all(reject["reason"] and reject["message"] for reject in rejects)
    assert not {reject["reason"] for reject in rejects[-3:]} & set(BAD)
    with pytest.raises(ShardError, match="all 1 rows are bad"):
        build(listing(files, ["{\n"]), tmp_path / "none", BuildOptions(skip_bad=True))
    assert not (tmp_path / "none").exists()


def test_build_presamples(files: Path, tmp_path: Path) -> None:
    path = listing(files, GOOD[:1])
    main(["build", str(path), str(tmp_path / "out"), "--presample", "uniform(4)", "--presample-px", "256"])
    read = open_sources(tmp_path / "out")["my_list"].read(0).target.media[0].source
    direct = decode(files / "a.mp4", Sampling.uniform(4))
    assert read.pixels.shape == (4, 16, 16, 3)
    assert np.array_equal(read.indices, direct.indices)
    # Flat colours survive scaling and JPEG.
    assert np.abs(read.pixels.astype(int) - direct.pixels[:, ::2, ::2]).max() <= 4


def test_commands(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = str(tmp_path / "out")
    assert main(["build", str(listing(files, GOOD)), out]) == 0
    assert main(["check", out]) == 0
    capsys.readouterr()
    assert main(["stats", out, "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["sources"]["extra"]["queries"] == 1
    assert main(["stats", out]) == 0
    assert "my_list_ti2v" in capsys.readouterr().out
    (tmp_path / "out/level2/T2V/extra-000000.tar").write_bytes(b"")
    assert main(["check", out, "--json"]) == 1
    assert any("an empty file is no shard" in problem for problem in json.loads(capsys.readouterr().out)["problems"])
    for words in (["check", str(tmp_path)], ["stats", str(tmp_path)], ["build", str(tmp_path / "no.jsonl"), out]):
        with pytest.raises(ShardError):
            main(words)
    assert list(Manifest.load(tmp_path / "out").sources) == ["extra", "my_list_t2v", "my_list_ti2t", "my_list_ti2v"]
