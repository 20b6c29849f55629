"""Stage 1 of the synthesis, files: what is measured of a video, what is cut out of it, damage and its repair."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import yaml

from gve.encode.encoder import Encoded
from gve.items import InputError, Item
from gve.synth.config import make_plan, read_config
from gve.synth.crew import run
from gve.synth.folder import StepFolder
from gve.synth.media import MediaStore
from gve.synth.quality import REASONS, ClipHash, Cutting, Scan, ScanOptions
from gve.synth.quality.footage import plan
from gve.synth.units import Context, Outcome, Row
from gve.toy.base import random_twin
from gve.video import Sampling, decode, decode_image, probe

SIDE = 96


def pictures(seed: int, count: int = 24) -> list[np.ndarray]:
    """A bright square that walks over a ground of its own, [96, 96, 3] uint8 each."""
    draw = np.random.default_rng(seed)
    coarse = draw.integers(0, 160, (6, 6, 3))
    ground = np.kron(coarse, np.ones((SIDE // 6, SIDE // 6, 1))).astype(np.uint8)
    shown = []
    for place in range(count):
        picture = ground.copy()
        left = 2 * place % 70
        picture[30:50, left : left + 20] = 250
        shown.append(picture)
    return shown


def mux(container: Any, shown: Sequence[np.ndarray], gop: int) -> None:
    """H.264 at 12 Hz into an open container, and its end."""
    options = {"g": str(gop), "bf": "0", "crf": "12", "threads": "1", "x264-params": "log=-1"}
    stream = container.add_stream("libx264", rate=12, options=options)
    stream.height, stream.width, stream.pix_fmt = SIDE, SIDE, "yuv420p"
    for picture in shown:
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
    container.mux(stream.encode())
    container.close()


def movie(shown: Sequence[np.ndarray], form: str = "mp4", *, gop: int = 8, **options: str) -> bytes:
    file = io.BytesIO()
    mux(av.open(file, "w", format=form, options=options), shown, gop)
    return file.getvalue()


def indexed_movie(folder: Path, shown: Sequence[np.ndarray]) -> bytes:
    """MP4 with its index in front, so that it opens when it is cut; FFmpeg can write that to a file only."""
    path = folder / "indexed.mp4"
    mux(av.open(str(path), "w", options={"movflags": "+faststart"}), shown, gop=8)
    return path.read_bytes()


def sound_only() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def row_of(path: Path, caption: str = "a white square walks to the right", **values: Any) -> Row:
    row = {"id": path.name, "source": "web", "video": {"file": str(path)}, "caption": caption, "meta": {}}
    return {**row, "start_s": None, "end_s": None, **values}


def context(folder: Path, encoder: Any = None) -> Context:
    def load() -> Any:
        assert encoder, "nothing is to be measured"
        return encoder

    return Context(MediaStore(folder), 0, load, lambda step: ())


def scan(folder: Path, rows: Sequence[Row], encoder: Any = None, **options: Any) -> dict[str, Outcome]:
    """Row -> outcome; they add up, and every reject is one of the table."""
    stage = Scan(ScanOptions(**{"similarity": encoder is not None, **options}), context(folder, encoder))
    outcomes = list(stage.run(rows))
    for outcome in outcomes:
        outcome.check()
        for reject in outcome.rejects:
            assert reject.stage == "quality"
            assert reject.id != outcome.id or REASONS[reject.reason].step == "scan"
    assert sorted(outcome.id for outcome in outcomes) == sorted(row["id"] for row in rows)
    return {outcome.id: outcome for outcome in outcomes}


# --------------------------------------------------------------------------------------------------- measures and cuts


def test_a_video_of_three_shots(tmp_path: Path) -> None:
    """3 x 24 frames at 12 Hz: shots begin at 0, 2 and 4 s."""
    shown = [picture for seed in (1, 2, 3) for picture in pictures(seed)]
    path = tmp_path / "three.mp4"
    path.write_bytes(movie(shown))
    row = scan(tmp_path, [row_of(path)], cutting=Cutting(max_clips=3))["three.mp4"].rows[0]
    quality = row["quality"]
    facts = {"codec": "h264", "width": 96, "height": 96, "frames": 72, "duration_s": 6.0, "fps": 12.0}
    assert quality["video"] == facts
    assert quality["shots"] == [0.0, 2.0, 4.0]
    assert quality["similarity"] is None
    assert (quality["dynamics"]["held_longest"], quality["dynamics"]["black_share"]) == (0.0, 0.0)
    sampled = decode(path, Sampling())
    assert quality["hash"] == str(ClipHash.of(sampled.pixels))
    # A frame from the middle of each shot, 11 frames into it or next to it, and none that the encoder samples anyway.
    places = [round(frame["time_s"] * 12) for frame in row["frames"]]
    assert all(abs(place - middle) <= 1 for place, middle in zip(places, (12, 36, 60), strict=True))
    assert not set(places) & set(sampled.indices.tolist())
    store = MediaStore(tmp_path)
    for frame, place in zip(row["frames"], places, strict=True):
        seen = decode_image(store.image(frame).source).astype(int)
        assert np.abs(seen - shown[place]).mean() < 4  # of 255; another shot is 50 off
        assert np.abs(seen - shown[(place + 24) % 72]).mean() > 20
    # A clip may have half of the video, 3 s: each shot is one, and holds just its own frames from its own start.
    assert [(clip["start_s"], clip["end_s"]) for clip in row["clips"]] == [(0.0, 2.0), (2.0, 4.0), (4.0, 6.0)]
    for number, clip in enumerate(row["clips"]):
        cut = decode(store.video(clip).source, Sampling.uniform(24))
        assert cut.num_frames == 24
        assert np.allclose(cut.times_s, np.arange(24) / 12, atol=1e-3)
        assert np.abs(cut.pixels.astype(int) - np.stack(shown[24 * number : 24 * number + 24])).mean() < 4
        assert probe(store.video(clip).source).duration_s == pytest.approx(2.0, abs=0.1)


def test_what_is_cut_by_hand() -> None:
    """40 frames at 10 Hz in shots of 1 s and 3 s; frames 5 and 25 are sampled."""
    times_s = np.arange(40) / 10
    frames, clips = plan(times_s, 4.0, [0, 10], {5, 25}, Cutting())
    assert frames == [4, 24]
    # A clip has at most 2 s, so the second shot is two parts of 1.5 s; two of the three parts are taken.
    assert clips == [(0, 10), (25, 40)]
    assert plan(times_s, 4.0, [0, 10], set(), Cutting(max_clips=9))[1] == [(0, 10), (10, 25), (25, 40)]
    assert plan(times_s, 4.0, [0, 10], set(), Cutting(min_clip_s=1.2))[1] == [(10, 25), (25, 40)]
    assert plan(times_s, 4.0, [0, 10], set(), Cutting(max_frames=1))[0] == [25]  # of the longest shot
    assert plan(times_s, 4.0, [0, 10], set(), Cutting(max_frames=0, max_clips=0)) == ([], [])
    assert plan(times_s, 4.0, [0], set(range(40)), Cutting())[0] == []  # no frame that is not sampled


def test_a_large_clip_is_scaled_down_and_sparse_looks_see_no_shots(tmp_path: Path) -> None:
    path = tmp_path / "two.mp4"
    path.write_bytes(movie(pictures(1) + pictures(2)))
    cut = Cutting(every_frame=False, clip_side_px=48, max_clips=1)
    row = scan(tmp_path, [row_of(path)], cutting=cut)["two.mp4"].rows[0]
    assert row["quality"]["shots"] == [0.0]
    about = probe(MediaStore(tmp_path).video(row["clips"][0]).source)
    assert (about.width, about.height, about.num_frames) == (48, 48, 24)


def test_the_span_that_is_meant_becomes_the_video(tmp_path: Path) -> None:
    shown = pictures(1) + pictures(2)
    path = tmp_path / "two.mp4"
    path.write_bytes(movie(shown))
    rows = [row_of(path, start_s=2.0, end_s=None), row_of(path, id="late", start_s=9.0, end_s=12.0)]
    found = scan(tmp_path, rows)
    row = found["two.mp4"].rows[0]
    assert (row["start_s"], row["end_s"]) == (None, None)
    assert row["meta"] == {"span": [2.0, None], "original": {"file": str(path)}}
    assert row["quality"]["video"]["frames"] == 24
    assert row["quality"]["sha256"] == row["video"]["sha256"]  # two spans of a file are two videos
    seen = decode(MediaStore(tmp_path).video(row["video"]).source, Sampling.uniform(24)).pixels
    assert np.abs(seen.astype(int) - np.stack(shown[24:])).mean() < 4
    reject = found["late"].rejects[0]
    assert (reject.reason, reject.score) == ("span", pytest.approx(47 / 12, abs=1e-3))


# --------------------------------------------------------------------------------------------------------------- damage


def damaged(folder: Path) -> Mapping[str, bytes]:
    """Files of 48 frames, by name; whole ones among them."""
    shown = pictures(1, 48)
    plain, indexed = movie(shown), indexed_movie(folder, shown)
    with av.open(io.BytesIO(indexed)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    start, size = packets[46]
    hole = start + size // 3
    return {
        "whole.mp4": plain,
        "named-wrongly.mp4": movie(shown, "matroska"),
        "fragments.mp4": movie(shown, movflags="+frag_keyframe+empty_moov"),
        "zero.mp4": b"",
        "text.mp4": b"this is no video\n" * 100,
        "no-index.mp4": plain[: len(plain) * 2 // 3],
        "sound.mp4": sound_only(),
        "last-cut.mp4": indexed[: packets[-2][0]],  # 46 of 48 frames are left
        "half-cut.mp4": indexed[: packets[24][0]],
        "garbled.mp4": indexed[:hole] + b"\xff" * (size // 3) + indexed[hole + size // 3 :],
    }


@pytest.fixture(scope="module")
def damaged_rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    folder = tmp_path_factory.mktemp("damaged")
    for name, data in damaged(folder).items():
        (folder / name).write_bytes(data)
    return [row_of(folder / name) for name in [*damaged(folder), "missing.mp4"]]


def test_damage_is_named_and_repaired_where_it_can_be(damaged_rows: list[Row], tmp_path: Path) -> None:
    found = scan(tmp_path, damaged_rows)
    reasons = {id: tuple(reject.reason for reject in outcome.rejects) for id, outcome in found.items()}
    assert reasons == {
        "whole.mp4": (),
        "named-wrongly.mp4": (),  # content decides, not the name
        "fragments.mp4": (),
        "zero.mp4": ("empty",),
        "text.mp4": ("not-a-video", "nothing-left"),  # the second is the repair's, a part of the outcome
        "no-index.mp4": ("not-a-video", "nothing-left"),
        "sound.mp4": ("no-video-stream",),
        "last-cut.mp4": (),
        "half-cut.mp4": ("truncated", "too-little-left"),
        "garbled.mp4": (),
        "missing.mp4": ("missing",),
    }
    meta = {id: outcome.rows[0]["meta"] for id, outcome in found.items() if outcome.rows}
    assert not any(meta[id] for id in ("whole.mp4", "named-wrongly.mp4", "fragments.mp4"))
    cut, garbled = meta["last-cut.mp4"], meta["garbled.mp4"]
    assert (cut["repaired"], cut["fault"], cut["kept"]) == ("remux", "truncated", pytest.approx(46 / 48, abs=1e-4))
    assert (garbled["repaired"], garbled["fault"]) == ("reencode", "garbled")
    assert garbled["kept"] >= 0.9
    assert Counter((outcome.tried, outcome.made) for outcome in found.values()) == {(0, 0): 6, (1, 0): 3, (1, 1): 2}
    # A copied stream shows the very same pixels.
    row = found["last-cut.mp4"].rows[0]
    assert row["video"]["made"].endswith(".mkv")
    mended = decode(MediaStore(tmp_path).video(row["video"]).source, Sampling.uniform(46))
    whole = indexed_movie(tmp_path, pictures(1, 48))
    assert np.array_equal(mended.pixels, decode(whole, Sampling.uniform(48)).pixels[:46])
    assert np.allclose(mended.times_s, np.arange(46) / 12, atol=2e-3)
    # Every frame that was encoded again shows what it showed; none is made of damaged ones.
    row = found["garbled.mp4"].rows[0]
    mended = decode(MediaStore(tmp_path).video(row["video"]).source, Sampling.uniform(44))
    places = (mended.times_s * 12).round().astype(int)
    assert np.abs(mended.pixels.astype(int) - np.stack(pictures(1, 48))[places]).mean() < 4


def test_repair_can_be_bounded_and_switched_off(damaged_rows: list[Row], tmp_path: Path) -> None:
    rows = [row for row in damaged_rows if row["id"] in ("last-cut.mp4", "garbled.mp4")]
    found = scan(tmp_path, rows, repair="none")
    assert {id: [reject.reason for reject in outcome.rejects] for id, outcome in found.items()} == {
        "last-cut.mp4": ["truncated"],
        "garbled.mp4": ["garbled"],
    }
    found = scan(tmp_path, rows, repair="remux")
    assert found["last-cut.mp4"].made == 1
    assert [reject.reason for reject in found["garbled.mp4"].rejects] == ["garbled", "still-garbled"]
    found = scan(tmp_path, rows, min_kept=0.99)
    assert not any(outcome.rows for outcome in found.values())


@pytest.mark.parametrize(
    ("options", "reason", "score"),
    [
        ({"min_side_px": 97}, "too-small", 96.0),
        ({"min_frames": 49}, "too-few-frames", 48.0),
        ({"min_duration_s": 4.1}, "too-short", 4.0),
        ({"max_duration_s": 3.9}, "too-long", 4.0),
        ({"codecs": ("hevc", "vp9")}, "codec", None),
    ],
)
def test_limits(damaged_rows: list[Row], tmp_path: Path, options: Any, reason: str, score: float | None) -> None:
    (outcome,) = scan(tmp_path, damaged_rows[:1], **options).values()
    assert (outcome.rejects[0].reason, outcome.rejects[0].score) == (reason, score)
    assert scan(tmp_path, damaged_rows[:1], codecs=("h264",), min_side_px=96)["whole.mp4"].rows


# ---------------------------------------------------------------------------------------------------------- consistency


class Table:
    """An Encoder whose vectors are written down: an angle for each text and each file."""

    dim, weights_hash, inputs = 2, "table", {}

    def __init__(self, angles: Mapping[str, float], fingerprint: str = "table") -> None:
        self.angles, self.fingerprint = angles, fingerprint

    def encode(self, items: Sequence[Item], *, transform: object = None, progress: str = "") -> Encoded:
        names = [item.text or Path(item.media[0].name).name for item in items]
        radians = np.radians([self.angles[name] for name in names])
        vectors = np.stack([np.cos(radians), np.sin(radians)], 1).astype(np.float32)
        return Encoded(vectors, dict.fromkeys(np.flatnonzero(np.isnan(radians)).tolist(), "broken"))


def test_similarity_of_caption_and_video(tmp_path: Path) -> None:
    data = movie(pictures(1))
    for name in "abc":
        (tmp_path / name).write_bytes(data)
    rows = [row_of(tmp_path / "a", "near"), row_of(tmp_path / "b", " "), row_of(tmp_path / "c", "far")]
    encoder = Table({"near": 10.0, "a": 70.0, "far": 0.0, "c": np.nan})
    for batch in (1, 64):
        found = scan(tmp_path, rows, encoder, batch=batch)
        assert found["a"].rows[0]["quality"]["similarity"] == 0.5  # cosine of 60 degrees
        assert found["b"].rows[0]["quality"]["similarity"] is None  # no caption
        assert found["c"].rejects[0].reason == "not-embedded"
        assert found["c"].rejects[0].detail == "broken"


def test_the_fingerprint_names_the_encoder_where_one_measures(tmp_path: Path) -> None:
    encoder = Table({}, "weights of yesterday")
    on = Scan(ScanOptions(), context(tmp_path, encoder)).fingerprint
    assert on["encoder"] == "weights of yesterday"
    off = Scan(ScanOptions(similarity=False), context(tmp_path)).fingerprint
    assert "encoder" not in off
    assert on == {**off, "encoder": "weights of yesterday"}


# ------------------------------------------------------------------------------------------------------------- pipeline


def write_config(folder: Path, changes: Callable[[dict[str, Any]], None] = lambda sections: None) -> Path:
    """A list of ten rows, and a configuration of the real steps up to `select`."""
    (folder / "clips").mkdir(parents=True)
    files = {f"good{number}.mp4": movie(pictures(10 + number)) for number in range(4)}
    files |= {"still.mp4": movie([pictures(20)[0]] * 24), "zero.mp4": b"", "again.mp4": movie(pictures(10), gop=3)}
    for name, data in files.items():
        (folder / "clips" / name).write_bytes(data)
    captions = {"good3.mp4": "see www.example.com"}
    rows = [(name, captions.get(name, f"a white square walks over ground {name[-5]}")) for name in files]
    rows += [("good1.mp4", "the same file once more"), ("gone.mp4", "nothing is here to be seen")]
    lines = [
        json.dumps({"id": str(i), "video": f"clips/{name}", "caption": text}) for i, (name, text) in enumerate(rows)
    ]
    (folder / "list.jsonl").write_text("\n".join(lines))
    sections: dict[str, Any] = {
        "input": {"sources": [{"path": str(folder / "list.jsonl"), "name": "web"}]},
        "scan": {"similarity": False},
        "run": {"unit_rows": 3, "poll_s": 0.05},
    }
    changes(sections)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def test_the_pipeline_adds_up_and_two_workers_do_what_one_does(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    numbers = {}
    for workers in (1, 2):
        out = tmp_path / f"out{workers}"
        numbers[workers] = run(make_plan(read_config(config, [f"run.workers={workers}"]), out, captioners={}), "select")
    table = {step["step"]: (step["in"], step["out"], step["rejected"]) for step in numbers[1]["steps"]}
    assert table == {
        "input": (9, 8, {"missing": 1}),
        "scan": (8, 7, {"empty": 1}),
        "select": (7, 3, {"caption-url": 1, "static-video": 1, "near-duplicate": 1, "duplicate": 1}),
    }
    assert numbers[1] == numbers[2]
    kept = [row["id"] for row in StepFolder(tmp_path / "out1", "select").slices()[0].rows()]
    assert kept == ["web:0", "web:1", "web:2"]
    rejects = [json.loads(line) for line in (tmp_path / "out1/rejects.jsonl").read_text().splitlines()]
    assert {reject["id"]: reject["detail"] for reject in rejects if "dupl" in reject["reason"]} == {
        "web:6": "web:0",
        "web:7": "web:1",
    }
    for path in sorted((tmp_path / "out1").rglob("*")):
        if path.suffix in (".jsonl", ".jpg", ".mp4"):  # rows, rejects, and all that was cut
            assert path.read_bytes() == (tmp_path / "out2" / path.relative_to(tmp_path / "out1")).read_bytes(), path


def test_a_run_without_an_encoder_says_so(tmp_path: Path) -> None:
    config = write_config(tmp_path, lambda sections: sections.pop("scan"))
    with pytest.raises(InputError, match="name an embedder"):
        run(make_plan(read_config(config), tmp_path / "out", captioners={}), "select")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_similarities_of_a_real_encoder_do_not_depend_on_the_workers(tmp_path: Path) -> None:
    random_twin(tmp_path / "base")

    def measured(sections: dict[str, Any]) -> None:
        del sections["scan"]
        sections["encoder"] = {"model": str(tmp_path / "base"), "frames": "uniform(8)", "max_frame_tokens": 9}
        sections["select"] = {"drop_share": 0.4, "rules": ["inconsistent"]}

    config = write_config(tmp_path / "run", measured)
    found = []
    for workers, batch in ((1, 64), (2, 1)):
        changes = [f"run.workers={workers}", f"scan.batch={batch}"]
        numbers = run(make_plan(read_config(config, changes), tmp_path / f"out{workers}", captioners={}), "select")
        assert numbers["steps"][-1]["rejected"] == {"inconsistent": 2}  # 40% of 7
        rows = [row for part in StepFolder(tmp_path / f"out{workers}", "scan").slices() for row in part.rows()]
        found.append([row["quality"]["similarity"] for row in rows])
        identity = StepFolder(tmp_path / f"out{workers}", "scan").identity()
        assert identity is not None
        assert len(identity.fingerprint["encoder"]) == 64
    assert len(set(found[0])) > 5
    assert np.allclose(found[0], found[1], atol=1.01e-4)  # in another batch a value may be rounded the other way


# ---------------------------------------------------------------------------------------------------------- real files


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_real_files(real: Path, tmp_path: Path) -> None:
    """Damaged, odd and turned files; what each of them is stands in the README beside them."""
    expected = {
        "corrupt/bbb_1ch_16kHz_aac.mp4": "no-video-stream",
        "corrupt/block_ends_beyond_cluster.mkv": "truncated",  # 1 frame of 9 s
        "corrupt/corrupted.mp4": "",
        "corrupt/fixture-corrupt.mkv": "not-a-video",
        "corrupt/fixture-moov.mov": "not-a-video",
        "corrupt/fixture2.mkv": "truncated",  # 37 frames of 19 minutes
        "corrupt/invalid-bitstream.webm": "undecodable",
        "corrupt/invalid_vp9_bitstream-bug_1416.webm": "too-large",
        "corrupt/media3_sample_malformed_free_box.mp4": "not-a-video",
        "corrupt/playable_but_bad_container.mkv": "",  # only its name is wrong
        "corrupt/result.webm": "empty",
        "good/bbb_176x144_128kbps_15fps_h263.3gp": "",
        "good/bear-vp9-odd-dimensions.webm": "",
        "good/fixture2.3gp": "",
        "good/h265_10bits.mp4": "",
        "good/newtonscradle.gif": "",
        "good/bitmap.mp4": "too-small",
        "good/video_90.mov": "",
    }
    rows = [row_of(real / "videos" / name, id=name) for name in expected]
    found = scan(tmp_path, rows, min_frames=3, min_duration_s=0.05, cutting=Cutting(min_clip_s=0.02), min_kept=0.5)
    assert {id: outcome.rejects[0].reason if outcome.rejects else "" for id, outcome in found.items()} == expected
    mended = found["corrupt/corrupted.mp4"].rows[0]["meta"]
    assert (mended["repaired"], mended["fault"]) == ("reencode", "truncated")
    assert mended["kept"] == pytest.approx(28 / 50, abs=0.1)  # 28 of 50 frames come before the damage
    store = MediaStore(tmp_path)
    for id in ("good/video_90.mov", "good/bear-vp9-odd-dimensions.webm"):
        row = found[id].rows[0]
        video = row["quality"]["video"]
        shape = (
            decode_image(store.image(row["frames"][0]).source).shape
            if row["frames"]
            else (video["height"], video["width"])
        )
        assert shape[:2] == (video["height"], video["width"])
        for clip in row["clips"]:
            about = probe(store.video(clip).source)
            assert (about.height, about.width) == (video["height"] // 2 * 2, video["width"] // 2 * 2)
