"""Video and picture reading: the index rule, both decoders, damage, the killable child, every mode of picture.

The clips are written here, frame i a noise of mean 19.5 + 5 i, so every claim about frames can be checked; the real
files are used where they are present.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import multiprocessing
import os
import pickle
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest
import torch

from gve import video
from gve.items import Frames, InputError
from gve.video import MediaError, Sampling, decode, decode_guarded, decode_image, frame_indices, guard, probe
from gve.video import decoders as video_decoders

EIGHT = Sampling.uniform(8)
BACKENDS = ["decord", "pyav"] if video.DECORD_AVAILABLE else ["pyav"]
needs_decord = pytest.mark.skipif(not video.DECORD_AVAILABLE, reason="decord is not installed")


def write_clip(path: Path, num_frames: int = 40, *, fps: int = 10, side: tuple[int, int] = (64, 96)) -> Path:
    """An H.264 file with a key frame every 12 frames and its header in front."""
    options = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "4", "g": "12"})
        stream.height, stream.width, stream.pix_fmt = *side, "yuv420p"
        for index in range(num_frames):
            noise = np.random.default_rng(index).integers(0, 40, (*side, 3)) + 5 * index
            frame = av.VideoFrame.from_ndarray(noise.astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def shown_index(clip: Frames) -> np.ndarray:
    """Index of each frame, read from its pixels."""
    return (clip.pixels.mean((1, 2, 3)) - 19.5) / 5


@pytest.fixture(scope="module")
def clip_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4")


@pytest.fixture(autouse=True)
def _own_children() -> object:
    """No child outlives its test: fakes of one test must not decode in the next."""
    yield
    guard._pool.close()


# ---- which frames ----------------------------------------------------------------------------------------------------


def test_indices_by_hand() -> None:
    # linspace(0, 99, 8) = 0, 14.14, 28.29, 42.43, 56.57, 70.71, 84.86, 99
    assert frame_indices(100, 25.0, EIGHT).tolist() == [0, 14, 28, 42, 57, 71, 85, 99]
    # 3 frames for 8 places: linspace(0, 2, 8) = 0, .29, .57, .86, 1.14, 1.43, 1.71, 2
    assert frame_indices(3, 30.0, EIGHT).tolist() == [0, 0, 1, 1, 1, 1, 2, 2]
    assert frame_indices(1, 30.0, EIGHT).tolist() == [0] * 8


def test_indices_equal_the_released_rule() -> None:
    """The released pipeline rounds a float32 torch.linspace; the negative control spreads without the last frame."""
    wrong = 0
    for count in (2, 4, 6, 8, 16, 48):
        for num_frames in range(1, 1500):
            released = torch.linspace(0, num_frames - 1, count).round().long().tolist()
            assert frame_indices(num_frames, 25.0, Sampling.uniform(count)).tolist() == released
            wrong += np.linspace(0, num_frames, count, endpoint=False).round().astype(int).tolist() != released
    assert wrong > 5000


@pytest.mark.parametrize(
    ("num_frames", "fps", "expected"),
    # 4 s -> 4; 5.9 s -> 5.9, even 4; 6 s -> 6; 7.96 s -> 6; 15 s -> at most 8; 1 s -> at least 4
    [(100, 25.0, 4), (177, 30.0, 4), (150, 25.0, 6), (199, 25.0, 6), (450, 30.0, 8), (30, 30.0, 4)],
)
def test_fps_rule_by_hand(num_frames: int, fps: float, expected: int) -> None:
    indices = frame_indices(num_frames, fps, Sampling.every(1.0, 8))
    assert len(indices) == expected
    assert (indices[0], indices[-1]) == (0, num_frames - 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 7}, "7 frames"),
        ({"num_frames": 0}, "0 frames"),
        ({"kind": "fps", "fps": 0.0}, "fps 0.0"),
        ({"kind": "fps", "fps": float("nan")}, "fps nan"),
        ({"kind": "fps", "min_frames": 3}, "3 frames"),
        ({"kind": "fps", "min_frames": 10}, "min_frames 10"),
        ({"kind": "random"}, "'random'"),
    ],
)
def test_sampling_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sampling(**arguments)


def test_sampling_text_goes_both_ways() -> None:
    for sampling, text in (
        (EIGHT, "uniform(8)"),
        (Sampling.every(1, 8), "fps(1,8)"),
        (Sampling.every(0.5, 16, 2), "fps(0.5,16,2)"),
    ):
        assert str(sampling) == text
        assert Sampling.parse(text) == sampling
    with pytest.raises(InputError, match="uniform\\(8\\)"):
        Sampling.parse("8 frames")


# ---- files that decode -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("as_bytes", [False, True])
def test_shows_the_right_frames(clip_path: Path, backend: str, as_bytes: bool) -> None:
    clip = decode(clip_path.read_bytes() if as_bytes else clip_path, EIGHT, backend=backend)
    assert clip.pixels.shape == (8, 64, 96, 3)
    assert clip.pixels.dtype == np.uint8
    assert clip.indices.tolist() == [0, 6, 11, 17, 22, 28, 33, 39]  # linspace(0, 39, 8), 5.57 apart
    np.testing.assert_allclose(clip.times_s, clip.indices / 10, atol=1e-9)  # 10 frames a second
    np.testing.assert_allclose(shown_index(clip), clip.indices, atol=0.4)
    assert (clip.num_frames, clip.native_fps) == (40, 10.0)


@needs_decord
def test_decoders_agree_to_the_bit(clip_path: Path, real: Path) -> None:
    """On all that decord may decode. Negative control: 10-bit colour, which is kept from decord, does differ."""
    names = ("realshort.mp4", "fire2.mp4", "elf.webm", "asl_no.mkv", "bear-vp9.webm", "media3_sample_fragmented.mp4")
    for path in (clip_path, *(real / "videos" / "good" / name for name in names)):
        assert probe(path).backend == "decord"
        first, second = (decode(path, EIGHT, backend=backend) for backend in ("decord", "pyav"))
        assert np.array_equal(first.pixels, second.pixels), path
        assert np.array_equal(first.times_s, second.times_s)
    deep = real / "videos" / "good" / "h264_10bits.mp4"
    assert probe(deep).backend == "pyav"
    assert not np.array_equal(*(decode(deep, EIGHT, backend=backend).pixels for backend in ("decord", "pyav")))


@needs_decord
def test_times_are_those_of_decord(real: Path) -> None:
    """Variable rate, and a first time stamp of 10 s: decord's own times, from the first frame on."""
    import decord

    for name in ("cursed-vfr.mp4", "bbb_800x640_768kbps_30fps_avc_2b_firstpts_10_sec.mp4", "fixture-null.webm"):
        path = real / "videos" / "good" / name
        clip = decode(path, Sampling.uniform(4), backend="pyav")
        reader = decord.VideoReader(str(path), num_threads=1)
        times = reader.get_frame_timestamp(clip.indices)[:, 0]
        np.testing.assert_allclose(clip.times_s, times - reader.get_frame_timestamp(0)[0], atol=1e-4)
        assert clip.native_fps == pytest.approx(reader.get_avg_fps(), rel=1e-6)


def test_seeking_equals_reading_through(real: Path) -> None:
    names = ("big_buck_bunny_0_30.webm", "media3_sample.avi", "fixture2.3gp", "test_video_66x50.mov",
             "media3_sample_edit_list_only_preroll_sync_sample.mp4", "iibbibb_editlist_videoonly.mp4",
             "newtonscradle.gif", "media3_sample_h265.ts", "h265_video.mp4")  # fmt: skip
    for name in names:
        path = real / "videos" / "good" / name
        sought, read = decode(path, EIGHT, backend="pyav"), video_decoders._decode_all(path, EIGHT, name, None)
        assert np.array_equal(sought.pixels, read.pixels), name
        np.testing.assert_allclose(sought.times_s, read.times_s, atol=1e-6)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_rotation_is_applied_once(clip_path: Path, backend: str, turns: int) -> None:
    """The display matrix in the track header is set by hand (ISO 14496-12, 8.3.2); the picture must turn with it."""
    data = bytearray(clip_path.read_bytes())
    a, b = [(1, 0), (0, -1), (-1, 0), (0, 1)][turns]  # matrix [a b; -b a]: `turns` quarter turns counter-clockwise
    place = data.find(b"tkhd") + 4 + 40
    struct.pack_into(">9i", data, place, a << 16, b << 16, 0, -b << 16, a << 16, 0, 0, 0, 1 << 30)
    upright = decode(bytes(data), EIGHT, backend=backend)
    stored = decode(clip_path, EIGHT, backend=backend)
    assert np.array_equal(upright.pixels, np.rot90(stored.pixels, turns, axes=(1, 2)))
    info = probe(bytes(data))
    assert info.rotation_deg == 90 * turns
    assert (info.height, info.width) == upright.pixels.shape[1:3]


@pytest.mark.parametrize("backend", BACKENDS)
def test_real_rotation_goldens(real: Path, backend: str) -> None:
    """Mean brightness of the four quarters of frame 0, recorded after looking at the frames: all three are upright."""
    goldens = {
        "video_0.mov": ((320, 568), [99.8, 109.5, 91.5, 98.6]),
        "video_90.mov": ((568, 320), [106.4, 108.2, 75.1, 88.9]),
        "video_180.mov": ((320, 568), [117.8, 124.4, 96.2, 105.8]),
    }
    for name, (shape, quarters) in goldens.items():
        frame = decode(real / "videos" / "good" / name, Sampling.uniform(2), backend=backend).pixels[0].astype(float)
        height, width = frame.shape[:2]
        assert frame.shape == (*shape, 3)
        halves = [half for row in np.split(frame, [height // 2]) for half in np.split(row, [width // 2], axis=1)]
        np.testing.assert_allclose([half.mean() for half in halves], quarters, atol=0.5)


def test_short_clips_repeat_and_say_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = write_clip(tmp_path / "one.mp4", 1)
    with caplog.at_level(logging.WARNING, "gve.video"):
        clip = decode(one, EIGHT)
        decode(one, EIGHT)
    assert clip.indices.tolist() == [0] * 8
    assert clip.pixels.shape[0] == 8
    assert (clip.pixels == clip.pixels[0]).all()
    assert [r.getMessage() for r in caplog.records] == [
        f"{one}: 1 frames are fewer than the 8 sampled; frames are repeated"
    ]  # once a file
    assert decode_guarded(one, Sampling.every(1.0, 8)).indices.tolist() == [0] * 4


def test_content_decides_not_the_name(clip_path: Path, tmp_path: Path) -> None:
    lying = tmp_path / "clip.gif"
    lying.write_bytes(clip_path.read_bytes())
    assert decode(lying, EIGHT).num_frames == 40


def manifest(real: Path, folder: str) -> list[dict]:
    records = json.loads((real / "manifest.json").read_text())["videos"]
    return [record for record in records if record["file"].startswith(f"videos/{folder}/")]


def test_every_real_video_decodes(real: Path) -> None:
    """Counts, upright sizes and lengths against the manifest, recorded by a full decoding. 12 s of a core."""
    for record in manifest(real, "good"):
        path = real / record["file"]
        info, clip = probe(path), decode(path, Sampling.uniform(2))
        size = (record["coded_height"], record["coded_width"])
        upright = size[::-1] if record["rotation_deg_ccw"] % 180 else size
        assert clip.num_frames == info.num_frames == record["frames_decoded_pyav"], path.name
        assert clip.pixels.shape[1:3] == (info.height, info.width) == upright, path.name
        assert info.rotation_deg == record["rotation_deg_ccw"] % 360, path.name
        assert (info.codec, info.native_fps) == (record["codec"], pytest.approx(ratio(record["fps_average"])))
        assert clip.indices.tolist() == [0, info.num_frames - 1]
        assert clip.times_s[0] == 0.0
        assert (np.diff(clip.times_s) >= 0).all()
        if record["duration_s"]:
            # The last frame begins by the stated end; other streams and edit lists may stretch the file's own length.
            longest = record["frame_interval_min_max_s"][1]
            assert record["duration_s"] - longest - 0.6 < clip.times_s[-1] <= record["duration_s"], path.name


def ratio(text: str) -> float:
    numerator, _, denominator = text.partition("/")
    return float(numerator) / float(denominator or 1)


@pytest.mark.slow
def test_every_real_video_is_the_same_by_every_road(real: Path) -> None:
    for record in manifest(real, "good"):
        path = real / record["file"]
        plain, guarded = decode(path, EIGHT), decode_guarded(path, EIGHT)
        read = video_decoders._decode_all(path, EIGHT, path.name)
        assert np.array_equal(plain.pixels, guarded.pixels), path.name
        assert np.array_equal(plain.pixels, read.pixels), path.name
        np.testing.assert_allclose(plain.times_s, read.times_s, atol=1e-6, err_msg=path.name)


def test_works_with_decord_hidden(clip_path: Path, real: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = decode(clip_path, EIGHT)
    monkeypatch.setitem(sys.modules, "decord", None)  # `import decord` raises
    assert np.array_equal(decode(clip_path, EIGHT).pixels, expected.pixels)
    with pytest.raises(MediaError, match="decord cannot be loaded"):
        decode(clip_path, EIGHT, backend="decord")
    monkeypatch.setattr(video_decoders, "DECORD_AVAILABLE", False)
    assert probe(clip_path).backend == "pyav"
    assert np.array_equal(decode_guarded(clip_path, EIGHT).pixels, expected.pixels)
    for name in ("video_90.mov", "elf.webm", "fire2.mp4"):
        assert decode(real / "videos" / "good" / name, EIGHT).pixels.shape[0] == 8


# ---- files that do not -----------------------------------------------------------------------------------------------

CORRUPT = {
    "corrupted.mp4": "truncated",
    "result.webm": "empty",
    "fixture-corrupt.mkv": "not-a-video",
    "fixture-moov.mov": "not-a-video",
    "media3_sample_with_invalid_nalu.mp4": "truncated",
    "invalid-bitstream.webm": "undecodable",
    "invalid_vp9_bitstream-bug_1416.webm": "too-large",
    "media3_sample_malformed_free_box.mp4": "not-a-video",
    "no_timescale.mp4": "garbled",
    "block_ends_beyond_cluster.mkv": "truncated",
    "fixture2.mkv": "truncated",
    "bbb_1ch_16kHz_aac.mp4": "no-video-stream",
}


@pytest.mark.parametrize("read", [decode, decode_guarded])
def test_damaged_real_videos(real: Path, read: object) -> None:
    """All but one are refused with their reason; that one is sound, only its name is wrong (Ogg named .mkv)."""
    for record in manifest(real, "corrupt"):
        path = real / record["file"]
        if path.name == "playable_but_bad_container.mkv":
            assert read(path, EIGHT).num_frames == 150
            continue
        with pytest.raises(MediaError) as caught:
            read(path, EIGHT)
        assert caught.value.reason == CORRUPT[path.name], path.name
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("backend", ["auto", "pyav"])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.95, 0.999])
def test_a_cut_mp4_is_refused(clip_path: Path, backend: str, part: float) -> None:
    data = clip_path.read_bytes()
    with pytest.raises(MediaError) as caught:
        decode(data[: int(len(data) * part)], EIGHT, backend=backend, name="cut.mp4")
    assert caught.value.reason == "truncated"


def test_a_cut_mkv_is_refused_below_nine_tenths(tmp_path: Path) -> None:
    """MKV has no table of frames, only a length: the rule is 0.9 of it less a second."""
    data = write_clip(tmp_path / "long.mkv", 45, fps=2).read_bytes()
    with pytest.raises(MediaError, match=r"claims 22\.5 s"):
        decode(data[: int(len(data) * 0.7)], EIGHT)
    assert 40 <= decode(data[: int(len(data) * 0.97)], EIGHT).num_frames < 45


def test_flipped_bits_never_pass_as_frames(clip_path: Path) -> None:
    """30 copies with 5 flipped bits: refused, or right. Negative control: without `verify` decord shows wrong ones."""
    data, random = clip_path.read_bytes(), np.random.default_rng(0)
    start, refused, silent = data.find(b"mdat") + 1000, 0, 0
    for _ in range(30):
        damaged = bytearray(data)
        for place in random.integers(start, len(data), 5):
            damaged[place] ^= 1 << int(random.integers(8))
        try:
            clip = decode(bytes(damaged), EIGHT, verify=True, name="flipped")
            assert np.abs(shown_index(clip) - clip.indices).max() < 0.5
        except MediaError:
            refused += 1
        if video.DECORD_AVAILABLE:
            with contextlib.suppress(MediaError):
                clip = decode(bytes(damaged), EIGHT, backend="decord")
                silent += np.abs(shown_index(clip) - clip.indices).max() > 0.5
    assert refused > 15
    assert silent > 5 or not video.DECORD_AVAILABLE


def test_bad_sources_have_names(tmp_path: Path) -> None:
    empty, text, playlist = tmp_path / "empty.mp4", tmp_path / "text.mp4", tmp_path / "list.mp4"
    empty.write_bytes(b"")
    text.write_text("not a video\n" * 100)
    # FFmpeg would open what the list names: a known way to read other people's files.
    playlist.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n")
    cases = [
        (tmp_path / "absent.mp4", "missing"), (tmp_path, "missing"), ("http://127.0.0.1:9/clip.mp4", "missing"),
        (empty, "empty"), (b"", "empty"), (text, "not-a-video"), (playlist, "not-a-video"),
        (b"x" * 5000, "not-a-video"),
    ]  # fmt: skip
    for source, reason in cases:
        for read in (decode, decode_guarded):
            with pytest.raises(MediaError) as caught:
                read(source, EIGHT)
            assert caught.value.reason == reason, source
    with pytest.raises(MediaError, match=r"^shard/clip\.mp4: "):
        decode(b"x" * 5000, EIGHT, name="shard/clip.mp4")


def test_a_clip_that_is_too_large_is_refused_before_decoding(clip_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_decoders, "MAX_CLIP_BYTES", 8 * 64 * 96 * 3 - 1)
    for backend in BACKENDS:
        with pytest.raises(MediaError, match="sample fewer"):
            decode(clip_path, EIGHT, backend=backend)


def test_errors_cross_processes() -> None:
    error = MediaError("clip.mp4: bad", reason="garbled", name="clip.mp4")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.reason, again.name) == ("clip.mp4: bad", "garbled", "clip.mp4")
    assert str(type(error)("from a DataLoader worker")) == "from a DataLoader worker"  # torch re-raises with one string


# ---- the child -------------------------------------------------------------------------------------------------------


def fake_decord(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decord for the child, whose reader does `body`."""
    package = folder / "fake" / "decord"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "import os, time\nclass DECORDError(Exception): pass\nclass DECORDLimitReachedError(Exception): pass\n"
        "class logging:\n    QUIET = 0\n    set_level = print  # decoders print to stdout, where replies go\n"
        f"def VideoReader(*args, **kwargs):\n    {body}\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.setattr(video_decoders, "DECORD_AVAILABLE", True)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("os.abort()", "crashed"),
        ("time.sleep(60)", "timeout"),
        ("bytearray(8 << 30)", "out-of-memory"),
        ("os._exit(3)", "crashed"),
    ],
)
def test_a_lost_child_costs_only_the_attempt(
    clip_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, reason: str
) -> None:
    """With decord the reason is named; with auto PyAV takes the file in another child."""
    fake_decord(tmp_path, body, monkeypatch)
    began = time.monotonic()
    with pytest.raises(MediaError) as caught:
        decode_guarded(clip_path, EIGHT, backend="decord", timeout_s=1.0)
    assert caught.value.reason == reason
    clip = decode_guarded(clip_path, EIGHT, timeout_s=1.0)
    np.testing.assert_allclose(shown_index(clip), clip.indices, atol=0.4)
    assert time.monotonic() - began < 30


@needs_decord
def test_decords_real_hang_is_survived(real: Path) -> None:
    """decord 0.6 never returns from this MPEG-1 stream; auto knows, and gives it to PyAV."""
    path = real / "videos" / "good" / "fixture2.mpg"
    with pytest.raises(MediaError) as caught:
        decode_guarded(path, EIGHT, backend="decord", timeout_s=1.0)
    assert caught.value.reason in ("timeout", "undecodable")  # undecodable once decord's reader counts and returns
    assert decode_guarded(path, EIGHT).num_frames == 419


def test_one_child_serves_many_and_is_replaced(clip_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def child() -> int:
        (only,) = guard._pool._idle
        return only._process.pid

    decode_guarded(clip_path, EIGHT)
    first = child()
    with pytest.raises(MediaError):
        decode_guarded(b"x" * 5000, EIGHT)  # a bad file is no reason to end the child
    assert child() == first
    os.kill(first, 9)  # the child dies while it is idle
    guard._pool._idle[0]._process.wait()
    assert decode_guarded(clip_path, EIGHT).num_frames == 40
    second = child()
    assert second != first
    monkeypatch.setattr(guard, "CHILD_CLIPS", 1)
    decode_guarded(clip_path, EIGHT)
    assert child() != second


def test_threads_decode_side_by_side(clip_path: Path) -> None:
    found: dict[int, np.ndarray] = {}

    def work(count: int) -> None:
        for _ in range(3):
            found[count] = decode_guarded(clip_path, Sampling.uniform(count)).indices

    threads = [threading.Thread(target=work, args=(count,)) for count in (2, 4, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for count in (2, 4, 6):
        assert found[count].tolist() == frame_indices(40, 10.0, Sampling.uniform(count)).tolist()


def _decode_into(queue: object, path: Path, count: int) -> None:
    queue.put(decode_guarded(path, Sampling.uniform(count)).indices.tolist())


def test_works_in_forked_daemons(clip_path: Path) -> None:
    """DataLoader workers are daemons, and inherit the pipes of the parent's child: each needs a child of its own."""
    decode_guarded(clip_path, EIGHT)
    context = multiprocessing.get_context("fork")
    queues = [context.SimpleQueue() for _ in range(2)]
    workers = [
        context.Process(target=_decode_into, args=(queue, clip_path, count), daemon=True)
        for queue, count in zip(queues, (2, 4), strict=True)
    ]
    for worker in workers:
        worker.start()
    assert decode_guarded(clip_path, EIGHT).indices.tolist() == frame_indices(40, 10.0, EIGHT).tolist()
    assert [queue.get() for queue in queues] == [[0, 39], [0, 13, 26, 39]]
    for worker in workers:
        worker.join(20)
        assert worker.exitcode == 0


def test_the_child_leaves_with_its_parent(clip_path: Path) -> None:
    """Also when the parent is killed: the closed pipe ends it."""
    code = (
        "import os, sys; from gve import video; from gve.video import guard;"
        f"video.decode_guarded({str(clip_path)!r}, video.Sampling.uniform(2));"
        "print(guard._pool._idle[0]._process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    root = str(Path(video.__file__).resolve().parents[2])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=root)
    pid = int(done.stdout)
    for _ in range(100):
        try:
            if "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:1]:
                return
        except FileNotFoundError:
            return
        time.sleep(0.05)
    pytest.fail(f"child {pid} is still there")


def test_the_child_imports_no_torch() -> None:
    code = "import sys, gve.video; assert not {'torch', 'transformers', 'decord'} & set(sys.modules), 'heavy'"
    root = str(Path(video.__file__).resolve().parents[2])
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=root)


# ---- still pictures --------------------------------------------------------------------------------------------------


def stored(picture: PIL.Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("JPEG", {"quality": 95}),
        ("JPEG", {"quality": 60, "subsampling": 0}),
        ("JPEG", {"quality": 80, "subsampling": 1, "progressive": True}),
        ("JPEG", {"quality": 90, "exif": True}),
        ("JPEG grey", {"quality": 90}),
        ("JPEG CMYK", {"quality": 90}),
        ("PNG", {}),
    ],
)
def test_stored_frames_are_what_pillow_decodes(form: str, options: dict[str, object]) -> None:
    """Bit for bit, with odd sizes; a picture on its side is turned."""
    rng = np.random.default_rng(0)
    smooth = rng.normal(size=(3, 5, 7, 3)).repeat(13, 1).repeat(9, 2)[:, :61, :43]
    frames = (128 + 60 * smooth + rng.normal(0, 5, smooth.shape)).clip(0, 255).astype(np.uint8)
    if options.pop("exif", False):
        exif = PIL.Image.Exif()
        exif[0x0112] = 6
        options = {**options, "exif": exif}
    mode = {"JPEG grey": "L", "JPEG CMYK": "CMYK"}.get(form, "RGB")
    pictures = [PIL.Image.fromarray(frame).convert(mode) for frame in frames]
    jpegs = [stored(picture, form.split()[0], **options) for picture in pictures]
    expected = np.stack([decode_image(jpeg) for jpeg in jpegs])
    found = video.decode_stored_frames(jpegs)
    assert found.shape == ((3, 43, 61, 3) if "exif" in options else (3, 61, 43, 3))
    assert np.array_equal(found, expected)


def test_damaged_stored_frames_are_named() -> None:
    good = [stored(PIL.Image.new("RGB", (40, 30), (200, 30, shade)), "JPEG") for shade in (0, 200)]
    with pytest.raises(MediaError, match=r"clip 7: .*(?i:truncated)"):
        video.decode_stored_frames([good[0], good[1][:-40]], "clip 7")
    with pytest.raises(MediaError, match="frame 1 has another size than the first"):
        video.decode_stored_frames([good[0], stored(PIL.Image.new("RGB", (40, 32)), "JPEG")], "clip 7")
    with pytest.raises(MediaError, match="no picture format"):
        video.decode_stored_frames([b"no picture"], "clip 7")
    with pytest.raises(MediaError):
        video.decode_stored_frames([good[0][:30]], "clip 7")


def test_deep_grey_is_scaled_not_clipped() -> None:
    values = np.array([[0, 257, 32896, 65535]], np.uint16)  # 257 k is exactly k of 255
    for form in ("PNG", "TIFF"):
        data = stored(PIL.Image.fromarray(values), form)
        assert decode_image(data)[0, :, 0].tolist() == [0, 1, 128, 255]
    pgm = b"P5 4 1 65535\n" + values.astype(">u2").tobytes()  # Pillow's mode I
    assert decode_image(pgm)[0, :, 0].tolist() == [0, 1, 128, 255]
    # Negative control: Pillow's own conversion makes all but black white.
    assert np.asarray(PIL.Image.open(io.BytesIO(pgm)).convert("RGB"))[0, :, 0].tolist() == [0, 255, 255, 255]
    floats = stored(PIL.Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32)), "TIFF")
    assert decode_image(floats)[0, :, 1].tolist() == [0, 128, 255]


def test_transparency_lies_on_white() -> None:
    rgba = np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [200, 0, 0, 51]]], np.uint8)
    # a fifth of red 200 on white: 0.2 * 200 + 0.8 * 255 = 244, 0.8 * 255 = 204
    assert decode_image(stored(PIL.Image.fromarray(rgba), "PNG")).tolist() == [
        [[200, 0, 0], [255, 255, 255], [244, 204, 204]]
    ]
    palette = PIL.Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    assert decode_image(stored(palette, "PNG", transparency=1)).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    deep = PIL.Image.fromarray(np.array([[0, 65535, 700]], np.uint16))
    data = stored(deep, "PNG")
    chunk = struct.pack(">I4sH", 2, b"tRNS", 0)  # value 0 is transparent
    chunk += struct.pack(">I", zlib.crc32(chunk[4:]))
    place = data.find(b"IDAT") - 4
    assert decode_image(data[:place] + chunk + data[place:])[0, :, 0].tolist() == [255, 255, 3]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    """Expected by the EXIF table: row 0 and column 0 of the stored picture are these sides of the shown one."""
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3) * 20
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    shown = {
        1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1],
        5: pixels.swapaxes(0, 1), 6: np.rot90(pixels, -1), 7: pixels[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(pixels),
    }[orientation]  # fmt: skip
    assert np.array_equal(decode_image(stored(PIL.Image.fromarray(pixels), "PNG", exif=exif)), shown)


def test_picture_modes_and_frames() -> None:
    red = PIL.Image.new("CMYK", (2, 2), (0, 255, 255, 0))
    assert np.abs(decode_image(stored(red, "JPEG", quality=95)).astype(int) - [255, 0, 0]).max() < 8
    # CIE L* 50, a* = b* = 0 is the grey of sRGB 119 (in Pillow's bytes L is of 255, and a, b lie around 128).
    lab = PIL.Image.new("LAB", (2, 2), (128, 128, 128))
    assert np.abs(decode_image(stored(lab, "TIFF")).astype(int) - 119).max() <= 3
    first, second = PIL.Image.new("RGB", (2, 2), "blue"), PIL.Image.new("RGB", (2, 2), "lime")
    for form in ("GIF", "PNG", "WEBP", "TIFF"):
        options = {"lossless": True} if form == "WEBP" else {}
        data = stored(first, form, save_all=True, append_images=[second], **options)
        assert decode_image(data)[0, 0].tolist() == [0, 0, 255], form
    assert decode_image(stored(PIL.Image.new("1", (1, 1), 1), "PNG")).tolist() == [[[255, 255, 255]]]


def test_real_pictures(real: Path) -> None:
    """Size as shown, and the peculiar ones by their look (grey of the 16-bit portrait, white paper, red letters)."""
    for record in json.loads((real / "manifest.json").read_text())["images"]:
        if not record["file"].startswith("images/good/"):
            continue
        pixels = decode_image(real / record["file"])
        size = (record["height"], record["width"])
        turned = (record["exif_orientation"] or 1) >= 5
        assert pixels.shape in ((*size, 3), (*size[::-1], 3)) if turned else pixels.shape == (*size, 3), record["file"]
        assert pixels.dtype == np.uint8
        assert pixels.flags.writeable
    folder = real / "images" / "good"
    deep, plain = decode_image(folder / "hopper_16bit.pgm"), decode_image(folder / "hopper_orientation_6.jpg")
    assert np.corrcoef(deep.mean(2).ravel(), plain.mean(2).ravel())[0, 1] > 0.97  # the same portrait, upright in both
    webp = decode_image(folder / "hopper_orientation_8.webp")
    assert np.corrcoef(webp.ravel(), plain.ravel())[0, 1] > 0.97
    assert np.corrcoef(webp[::-1].ravel(), plain.ravel())[0, 1] < 0.5  # negative control: upside down
    assert decode_image(folder / "Landscape_6.jpg").shape == (1200, 1800, 3)
    assert decode_image(folder / "transparent.png")[0, 0].tolist() == [255, 255, 255]


def test_damaged_pictures(real: Path) -> None:
    reasons = {
        "truncated_jpeg.jpg": "truncated", "broken_data_stream.png": "undecodable", "fixture-json.webp": "not-an-image",
        "non-motion-photo-shortened.jpg": "truncated", "decompression_bomb.gif": "too-large",
        "zero_bytes_foo.png": "empty", "broken.png": "not-an-image",
    }  # fmt: skip
    for path in sorted((real / "images" / "corrupt").iterdir()):
        if path.name == "hopper_bad_exif.jpg":  # the picture is sound; Pillow ignores the damaged EXIF block
            with pytest.warns(UserWarning, match="EXIF"):
                assert decode_image(path).shape == (500, 500, 3)
            continue
        with pytest.raises(MediaError) as caught:
            decode_image(path)
        assert caught.value.reason == reasons[path.name]


def test_pictures_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = stored(PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)), "JPEG")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n"  # would start Ghostscript
    for source, reason in (
        (tmp_path / "absent.png", "missing"),
        (b"", "empty"),
        (whole[: len(whole) // 2], "truncated"),
        (eps, "not-an-image"),
        (np.zeros((4, 4), np.uint8), "not-an-image"),
        (np.zeros((4, 4, 3), np.float32), "not-an-image"),
        (np.zeros((0, 4, 3), np.uint8), "not-an-image"),
    ):
        with pytest.raises(MediaError) as caught:
            decode_image(source)
        assert caught.value.reason == reason
    monkeypatch.setattr(video.pictures, "MAX_PIXELS", 64 * 64 - 1)
    with pytest.raises(MediaError, match="64x64 px"):
        decode_image(whole)
    pixels = np.zeros((1, 1, 3), np.uint8)
    assert decode_image(pixels) is pixels


def test_stored_frames_are_close(clip_path: Path) -> None:
    """4:4:4 at quality 95. Negative control: halved colour (Pillow's default) is worse on coloured edges."""
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[8:23, 7:20] = (255, 0, 0)
    again = decode_image(video.encode_jpeg(pixels))
    halved = decode_image(stored(PIL.Image.fromarray(pixels), "JPEG", quality=95))
    error, worse = (np.abs(a.astype(int) - pixels).mean() for a in (again, halved))
    assert error < 0.5 < worse
