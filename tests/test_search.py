"""The index and the search over it: exact, incremental, whole after any kill, and safe against names and files."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest

from gve.cli import main
from gve.encode.topk import top_k
from gve.items import Frames, InputError, Item, Video
from gve.search.files import VideoFile, look_into, printable, walk
from gve.search.index import Clips, Index
from gve.search.indexing import check_record, compare, inspect, update_index, window_item
from gve.search.query import ask, make_query, parse_clip
from gve.search.windows import Windows
from gve.video import MediaError, Sampling, decode, decode_guarded
from search_runs import DIM, POINTS, Colours, bring_up, killed_at, record
from tiny_clip import write_dual_encoder, write_video

HOSTILE = [
    b'<script>alert("1")<|script>.mp4',
    b"line\nbreak' OR 1=1 --.mp4",
    b"a..%2f..[bold]&amp;.mp4",
    b"\xff\xfe.mp4",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six short videos, one of 7.25 s in a folder below; old enough that their times are trusted."""
    root = tmp_path_factory.mktemp("videos")
    (root / "below").mkdir()
    for seed in range(6):
        write_video(root / f"clip{seed}.mp4", seed, 16)
    write_video(root / "below" / "long.mp4", 50, 58)
    settle(root)
    return root


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "videos"))


def settle(root: Path) -> None:
    for number, path in enumerate(sorted(root.rglob("*"))):
        os.utime(path, (1_700_000_000 + number,) * 2)


def content(index: Index) -> dict[tuple[bytes, float, float], bytes]:
    """Every window of an index; a window that is there twice fails."""
    rows = index._clips.to_arrow().to_pylist()
    found = {(row["path"], row["start_s"], row["end_s"]): np.float32(row["vector"]).tobytes() for row in rows}
    assert len(found) == len(rows) == len(index)
    return found


# Windows and spans -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("duration", "expected"),
    [
        (3.0, [(0, 3)]),
        (10.0, [(0, 10)]),
        (12.4, [(0, 12.4)]),  # a rest of 2.4 s is less than half a stride
        (12.5, [(0, 10), (5, 12.5)]),
        (17.4, [(0, 10), (5, 17.4)]),
        (20.0, [(0, 10), (5, 15), (10, 20)]),
        (23.0, [(0, 10), (5, 15), (10, 20), (15, 23)]),
    ],
)
def test_windows_by_hand(duration: float, expected: list[tuple[float, float]]) -> None:
    assert Windows(10, 5).spans(duration) == expected


def test_windows_leave_nothing_out_and_whole_files_are_one() -> None:
    for duration in np.random.default_rng(0).uniform(0.1, 400, 200).tolist():
        spans = Windows(8, 3).spans(duration)
        assert spans[0][0] == 0
        assert spans[-1][1] == duration
        assert all(after[0] <= before[1] for before, after in itertools.pairwise(spans))
        assert len(spans) == 1 or all(6.5 <= end - start <= 9.5 for start, end in spans)
    assert Windows(0, 5).spans(900.0) == [(0.0, 900.0)]
    for length, stride, word in ((10, 11, "between"), (10, 0, "stride"), (-1, 1, "window")):
        with pytest.raises(InputError, match=word):
            Windows(length, stride)


def test_a_span_is_read_as_if_it_were_a_file(folder: Path) -> None:
    """Frames of a span are those of the file, numbered and timed from its start; by hand from all 58 frames."""
    path = folder / "below" / "long.mp4"
    every = decode(path, Sampling.uniform(58))
    assert every.num_frames == 58
    # 8 frames a second: 2 s to 5 s are frames 16 to 39, of which linspace takes 0, 8, 15 and 23.
    want = np.array([0, 8, 15, 23])
    for backend in ("auto", "decord", "pyav"):
        clip = decode_guarded(path, Sampling.uniform(4), backend=backend, span_s=(2.0, 5.0))
        assert clip.indices.tolist() == want.tolist()
        assert (clip.num_frames, clip.native_fps) == (24, 8.0)
        assert np.abs(clip.times_s - want / 8).max() < 1e-9
        assert (clip.pixels == every.pixels[16 + want]).all()
    other = decode_guarded(path, Sampling.uniform(4), span_s=(3.0, 6.0))
    assert not (other.pixels == every.pixels[16 + want]).all()
    # The encoder sees what it would see of a file that holds nothing else.
    alone = Frames(every.pixels[16 + want], want / 8, want, 24, 8.0)
    read = Colours().encode([Item((Video(path, span_s=(2.0, 5.0)),)), Item((Video(alone),)), Item((Video(path),))])
    assert (read.vectors[0] == read.vectors[1]).all()
    assert not (read.vectors[0] == read.vectors[2]).all()


def test_spans_at_the_edges(folder: Path) -> None:
    path = folder / "below" / "long.mp4"
    assert decode(path, Sampling.uniform(2), span_s=(7.2, 9.0)).num_frames == 1  # shown at 7.125 s, until 7.25 s
    with pytest.raises(MediaError, match=r"begins at 7\.25 s") as caught:
        decode_guarded(path, Sampling.uniform(2), span_s=(7.25, 9.0))
    assert caught.value.reason == "no-such-span"
    whole, part = Video(path), Video(path, span_s=(0.0, 1.0))
    assert whole.content_hash() != part.content_hash() != Video(path, span_s=(0.0, 2.0)).content_hash()
    assert part.sha256 == whole.sha256
    assert part.content_hash() == Video(path, part.sha256, span_s=(0.0, 1.0)).content_hash()
    for span in ((1.0, 1.0), (-1.0, 2.0), (0.0, np.inf)):
        with pytest.raises(InputError, match="span"):
            Video(path, span_s=span)


# Files -------------------------------------------------------------------------------------------------------------


def test_names_are_shown_on_one_line_and_stay_apart() -> None:
    assert printable(b"a\nb\x1b[31m\xff\xc3\xa9\xe2\x80\xae.mp4") == "a\\nb\\x1b[31m\\xff\u00e9\\u202e.mp4"
    assert printable(b"\xff") != printable(b"\xfe")


def test_walk_finds_files_and_says_what_it_could_not_see() -> None:
    # Below a folder that others may enter: root is not stopped by permissions, another user is.
    with tempfile.TemporaryDirectory(dir="/tmp") as root:
        os.chmod(root, 0o755)
        top = Path(root)
        for name in ("a.mp4", ".hidden.mp4", "closed/b.mp4", ".git/c.mp4", "index/d.mp4", "below/e.mp4"):
            (top / name).parent.mkdir(exist_ok=True)
            (top / name).write_bytes(b"x")
        os.symlink("..", top / "below" / "loop")
        os.symlink("nowhere", top / "dangling.mp4")
        os.mkfifo(top / "pipe.mp4")
        os.chmod(top / "closed", 0)
        if os.geteuid() == 0:
            os.seteuid(65534)
            try:
                seen = walk([top, top / "below"], leave_out=[top / "index"])
            finally:
                os.seteuid(0)
        else:
            seen = walk([top, top / "below"], leave_out=[top / "index"])
        os.chmod(top / "closed", 0o700)
        closed = os.fsencode(top / "closed")
        assert [found.path for found in seen.found] == [os.fsencode(top / name) for name in ("a.mp4", "below/e.mp4")]
        assert seen.blind == [closed]
        assert {os.path.basename(path) for path in seen.unreadable} == {b"closed", b"dangling.mp4", b"pipe.mp4"}
        assert seen.hidden == 2
        assert seen.covers(os.fsencode(top / "gone.mp4"))
        assert not seen.covers(closed + b"/b.mp4")
        assert not seen.covers(os.fsencode(top.parent / "other.mp4"))
        with pytest.raises(InputError, match="does not exist"):
            walk([top / "unmounted"])


# The index ---------------------------------------------------------------------------------------------------------


def file_named(name: bytes, digest: str = "0" * 64, duration_s: float = 30.0) -> VideoFile:
    return VideoFile(b"/v/" + name, 10, 20, digest, duration_s, 64, 48, 8.0, "h264")


def unit(*values: float) -> np.ndarray:
    vector = np.zeros(DIM, np.float32)
    vector[: len(values)] = values
    return vector / np.linalg.norm(vector)


def test_overlapping_windows_are_one_hit(tmp_path: Path) -> None:
    """By hand: cosines with the first axis are 0.8, 0.9, 0.7 and 0.6 for 0-10, 5-15, 10-20 and 20-30 s."""
    index = Index.create(tmp_path / "index", record())
    cosines = [0.8, 0.9, 0.7, 0.6]
    vectors = np.stack([unit(cosine, np.sqrt(1 - cosine**2)) for cosine in cosines])
    spans = [(0.0, 10.0), (5.0, 15.0), (10.0, 20.0), (20.0, 30.0)]
    index.add([Clips(file_named(b"a.mp4"), spans, vectors), Clips(file_named(b"b.mp4"), spans[:1], vectors[2:3])])
    hits = index.search(unit(1.0), 10)
    assert [(hit.file.path, hit.start_s, hit.end_s) for hit in hits] == [
        (b"/v/a.mp4", 5, 15),
        (b"/v/b.mp4", 0, 10),
        (b"/v/a.mp4", 20, 30),
    ]
    assert [hit.score for hit in hits] == pytest.approx([0.9, 0.7, 0.6], abs=1e-6)
    assert [index.search(unit(1.0), k) for k in (1, 2)] == [hits[:1], hits[:2]]
    assert len(index.search(unit(1.0), 10, merge=False)) == 5
    assert index.search(unit(1.0), 5, where="file LIKE '%b.mp4'") == [hits[1]]
    assert index.search(unit(1.0), 5, where="duration_s > 100") == []
    for where in ("nonsense >", "no_such = 1", "1; DROP TABLE clips"):
        with pytest.raises(InputError, match="filter"):
            index.search(unit(1.0), where=where)
    for vector in (np.ones(3, np.float32), np.full(DIM, np.nan, np.float32)):
        with pytest.raises(InputError, match="query"):
            index.search(vector)


def test_a_file_is_replaced_and_forgotten_as_a_whole(tmp_path: Path) -> None:
    index = Index.create(tmp_path / "index", record())
    names = [*HOSTILE, b"plain.mp4"]
    spans = [(0.0, 10.0), (5.0, 15.0), (10.0, 30.0)]
    vectors = np.eye(DIM, dtype=np.float32)
    index.add([Clips(file_named(name), spans, vectors[3 * at : 3 * at + 3]) for at, name in enumerate(names)])
    assert {file.path for file in index.files().values()} == {b"/v/" + name for name in names}
    before = content(index)
    index.add([Clips(file_named(HOSTILE[1], "1" * 64), spans[:2], vectors[20:22])])  # fewer windows than before
    after = content(index)
    path = b"/v/" + HOSTILE[1]
    assert {key: value for key, value in after.items() if key[0] != path} == {
        key: value for key, value in before.items() if key[0] != path
    }
    assert {key for key in after if key[0] == path} == {(path, *span) for span in spans[:2]}
    index.delete([file_named(HOSTILE[1]).file_id])
    assert set(content(index)) == {key for key in before if key[0] != path}
    index.touch(file_named(b"plain.mp4").file_id, 11, 21)
    reopened = Index.open(tmp_path / "index")
    assert reopened.record == record()
    assert reopened.files()[file_named(b"plain.mp4").file_id].mtime_ns == 21
    assert content(reopened) == content(index)


def test_what_is_no_index_is_refused(tmp_path: Path) -> None:
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.tex").touch()
    for make, word in ((Index.open, "no index"), (lambda uri: Index.create(uri, record()), "thesis.tex")):
        with pytest.raises(InputError, match=word):
            make(tmp_path / "papers")
    Index.create(tmp_path / "index", record())
    with pytest.raises(InputError, match="exists already"):
        Index.create(tmp_path / "index", record())
    other = Colours()
    other.fingerprint = "f" * 64
    index = Index.open(tmp_path / "index")
    with pytest.raises(InputError, match=r"made by model 'colours'.*'other'.*do not compare"):
        check_record(index, other, Windows(2, 1), "other")
    with pytest.raises(InputError, match="2 s every 1 s, not windows of 4 s every 2 s"):
        check_record(index, Colours(), Windows(4, 2), "colours")
    with pytest.raises(InputError, match="another model"):
        ask(index, other, Item.of("a"))


def test_exact_search_equals_brute_force_over_10000_vectors(tmp_path: Path) -> None:
    """Recall of the first ten is 1.0 exactly, and 1.0 of all cells; one cell of 100 misses, so the measure can fail."""
    noise = np.random.default_rng(3)
    centres = noise.normal(size=(200, DIM))
    vectors = (centres[noise.integers(0, 200, 10000)] + 0.6 * noise.normal(size=(10000, DIM))).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = Index.create(tmp_path / "index", record())
    for start in range(0, 10000, 2500):
        rows = range(start, start + 2500)
        index.add([Clips(file_named(b"%05d.mp4" % row), [(0.0, 30.0)], vectors[row : row + 1]) for row in rows])
    queries = vectors[:40] + 0.3 * noise.normal(size=(40, DIM)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    nearest, similarities = top_k(queries, vectors, 10)

    def recall(**options: int) -> float:
        kept = 0
        for query, rows in zip(queries, nearest, strict=True):
            hits = index.search(query, 10, **options)
            kept += len({int(hit.file.path[3:8]) for hit in hits} & set(rows.tolist()))
        return kept / nearest.size

    assert recall() == 1.0
    scores = [hit.score for hit in index.search(queries[0], 10)]
    assert np.abs(np.array(scores) - similarities[0]).max() < 1e-6
    with pytest.raises(InputError, match="no IVF index"):
        index.search(queries[0], nprobes=1)
    index.build_ivf(100)
    assert index.approximate
    assert recall() == 1.0  # exact stays exact beside the inverted file
    assert recall(nprobes=100) == 1.0
    assert recall(nprobes=1) < 0.9
    # What is added later is found, through the inverted file too.
    index.add([Clips(file_named(b"later.mp4"), [(0.0, 30.0)], queries[:1])])
    assert index.search(queries[0], 1, nprobes=1)[0].file.path == b"/v/later.mp4"


# Indexing ----------------------------------------------------------------------------------------------------------


def test_only_what_is_new_or_has_changed_is_encoded(copied: Path, tmp_path: Path) -> None:
    uri = tmp_path / "index"
    first = Colours()
    index, update = bring_up(uri, copied, first)
    assert (update.added, update.windows, update.rejected) == (7, 12, {})  # 6 of 2 s and one of 7.25 s: 6 windows
    assert len(first.encoded) == 12
    assert not (uri / "draft").exists()
    before = content(index)
    assert sorted(key[1:] for key in before if key[0].endswith(b"long.mp4")) == [
        (0, 2), (1, 3), (2, 4), (3, 5), (4, 6), (5, 7.25),
    ]  # fmt: skip

    again = Colours()
    index, update = bring_up(uri, copied, again)
    assert (update.added, update.changed, again.encoded) == (0, 0, [])

    os.utime(copied / "clip0.mp4", (1_790_000_000,) * 2)  # written again, the same content
    index, update = bring_up(uri, copied, again)
    assert (update.touched, update.changed, again.encoded) == (1, 0, [])
    assert compare(index, walk([copied])).unchanged == 7

    os.rename(copied / "below" / "long.mp4", copied / "below" / "moved.mp4")
    shutil.copy2(copied / "clip1.mp4", copied / "twin.mp4")
    write_video(copied / "clip2.mp4", 99, 16)
    os.utime(copied / "clip2.mp4", (1_790_000_000,) * 2)
    index, update = bring_up(uri, copied, again)
    assert again.encoded == [str(copied / "clip2.mp4")]
    assert (update.added, update.changed, update.reused) == (2, 1, 7)
    after = content(index)
    old, new = (os.fsencode(copied / "below" / name) for name in ("long.mp4", "moved.mp4"))
    assert all(after[(new, *span)] == vector for (path, *span), vector in before.items() if path == old)
    changed = (os.fsencode(copied / "clip2.mp4"), 0.0, 2.0)
    assert after[changed] != before[changed]

    # Vanished files stay until they are pruned; a folder that cannot be looked into has lost nothing.
    gone = compare(index, walk([copied]))
    assert list(gone.vanished.values()) == [str(copied / "below" / "long.mp4")]
    blind = walk([copied])
    blind.blind.append(os.fsencode(copied / "below"))
    assert compare(index, blind).vanished == {}
    assert old in {key[0] for key in content(index)}
    index, update = bring_up(uri, copied, again, prune=True)
    assert update.pruned == 1
    assert old not in {key[0] for key in content(index)}
    # What stands in the index now is what a new one would hold.
    assert content(index) == content(bring_up(tmp_path / "fresh", copied)[0])


def test_bad_files_are_named_counted_and_not_opened_twice(copied: Path, tmp_path: Path) -> None:
    (copied / "notes.txt").write_text("no video")
    (copied / "empty.mp4").touch()
    whole = (copied / "clip0.mp4").read_bytes()
    (copied / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (copied / "huge.mp4").write_bytes(whole + bytes(100_000))
    for number, name in enumerate(HOSTILE):
        path = os.fsencode(copied) + b"/" + name
        with open(path, "wb") as file:
            file.write(whole + bytes(number + 1))  # another content, the same film
    settle(copied)
    index = Index.create(tmp_path / "index", record())
    changes = compare(index, walk([copied]), max_bytes=100_000)
    assert [found.name for found in changes.huge] == [str(copied / "huge.mp4")]
    update = update_index(index, changes, Colours())
    reasons = {os.path.basename(name): reason.rpartition("(")[2][:-1] for name, reason in update.rejected.items()}
    assert reasons.pop("cut.mp4") in ("not-a-video", "truncated")
    assert reasons == {"notes.txt": "not-a-video", "empty.mp4": "empty"}
    paths = {file.path for file in index.files().values()}
    assert {os.fsencode(copied) + b"/" + name for name in HOSTILE} < paths
    assert len(paths) == 7 + len(HOSTILE)
    again = compare(index, walk([copied]), max_bytes=100_000)
    assert (again.new, again.changed, again.known_bad) == ([], [], 3)
    assert len(compare(index, walk([copied]), retry=True).new) == 4
    # A film that is damaged later loses its windows, and is found again once it is mended.
    (copied / "clip5.mp4").write_bytes(b"now a text")
    index, update = bring_up(tmp_path / "index", copied)
    assert list(update.rejected) == [str(copied / "clip5.mp4")]
    assert os.fsencode(copied / "clip5.mp4") not in {file.path for file in index.files().values()}
    shutil.copy(copied / "clip4.mp4", copied / "clip5.mp4")
    index, update = bring_up(tmp_path / "index", copied)
    assert os.fsencode(copied / "clip5.mp4") in {file.path for file in index.files().values()}
    assert len(index.rejected()) == 3


def test_a_file_that_changes_while_it_is_read_is_left_to_the_next_run(copied: Path, tmp_path: Path) -> None:
    class Slow(Colours):
        def encode(self, items: list[Item], **options: object) -> object:  # type: ignore[override]
            with open(copied / "clip3.mp4", "ab") as file:
                file.write(b"more")
            return super().encode(items, **options)  # type: ignore[arg-type]

    index, update = bring_up(tmp_path / "index", copied, Slow())
    assert update.unstable == [str(copied / "clip3.mp4")]
    assert len(index.files()) == 6
    index, update = bring_up(tmp_path / "index", copied)
    assert (update.added, len(index.files())) == (1, 7)


def check_kill(folder: Path, tmp_path: Path, point: tuple[str, int, str | float]) -> None:
    """After a kill the index opens, holds files whole or not at all, and the next run completes it."""
    uri, whole = tmp_path / "index", bring_up(tmp_path / "whole", folder, batch_windows=6)[0]
    want = content(whole)
    assert killed_at(uri, folder, point) == -9, "the point was never reached"
    if Index.exists(uri):
        have = content(Index.open(uri))
        assert have.items() <= want.items()
        for path in {key[0] for key in have}:
            assert sum(key[0] == path for key in have) == sum(key[0] == path for key in want)
    encoder = Colours()
    index, _ = bring_up(uri, folder, encoder, batch_windows=6)
    assert content(index) == want
    assert set(index.rejected()) == set(whole.rejected())
    assert len(encoder.encoded) <= len(want)
    if point[:2] == ("encode", 2):  # vectors of the commit that was being made were kept
        assert len(encoder.encoded) < len(want)


@pytest.fixture(scope="module")
def mixed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The videos and two files that are none, at the start and at the end."""
    root = Path(shutil.copytree(folder, tmp_path_factory.mktemp("mixed") / "videos"))
    for name in ("aaa.txt", "zzz.txt"):
        (root / name).write_text("no video")
    settle(root)
    return root


@pytest.mark.parametrize("point", POINTS[2:4], ids=str)
def test_killed_indexing_goes_on(mixed: Path, tmp_path: Path, point: tuple[str, int, str | float]) -> None:
    check_kill(mixed, tmp_path, point)


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS[:2] + POINTS[4:], ids=str)
def test_killed_indexing_goes_on_from_anywhere(
    mixed: Path, tmp_path: Path, point: tuple[str, int, str | float]
) -> None:
    check_kill(mixed, tmp_path, point)


def test_one_process_writes(folder: Path, tmp_path: Path) -> None:
    import fcntl

    index = Index.create(tmp_path / "index", record())
    with open(tmp_path / "index" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process"):
            update_index(index, compare(index, walk([folder])), Colours())
    assert len(index) == 0


def test_a_window_is_what_its_span_shows(folder: Path) -> None:
    path = os.fsencode(folder / "below" / "long.mp4")
    info = look_into(path)
    assert (info.duration_s, info.native_fps, info.codec) == (pytest.approx(7.25), 8.0, "h264")
    changes = compare(None, walk([folder / "below"]))
    (seen,) = inspect(changes)
    assert seen.file is not None
    whole, part = (window_item(seen.file, span).media[0] for span in ((0.0, 7.25), (0.0, 2.0)))
    assert isinstance(whole, Video)
    assert isinstance(part, Video)
    assert (whole.span_s, part.span_s) == (None, (0.0, 2.0))
    assert whole.content_hash() == Video(os.fsdecode(path)).content_hash()


# Questions and commands --------------------------------------------------------------------------------------------


def test_questions_are_read(tmp_path: Path) -> None:
    clip = parse_clip("film.mp4@1:02.5-1:10")
    assert (clip.source, clip.span_s) == ("film.mp4", (62.5, 70.0))
    assert parse_clip("film@home.mp4").span_s is None
    named = tmp_path / "film@1-2"
    named.touch()
    assert parse_clip(str(named)).span_s is None  # a file of that very name
    with pytest.raises(InputError, match="no time"):
        parse_clip("film.mp4@1:2:3:4-9")
    item = make_query("a dog", image="dog.jpg", instruction=None)
    assert item.modality == "TI"
    assert item.instruction == "Find the video clip that corresponds to the given text and the given image."
    assert make_query("a dog", instruction="").instruction == ""
    with pytest.raises(InputError, match="nothing is asked"):
        make_query("  ")


def gve(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def test_commands(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`gve index` and `gve search` with a model of the real class on disk, as a user types them."""
    model = write_dual_encoder(tmp_path / "model", "clip")
    uri = tmp_path / "index"
    new = (folder, "--out", uri, "--model", model, "--window", "2", "--num-workers", "0")
    code, out, _ = gve(capsys, "index", *new, "--dry-run", "--json")
    plan = json.loads(out)
    assert (code, plan["new"], plan["windows"], uri.exists()) == (0, 7, 12, False)
    code, out, _ = gve(capsys, "index", *new, "--json")
    assert (code, json.loads(out)["update"]["windows"]) == (0, 12)
    code, out, _ = gve(capsys, "index", folder, "--out", uri)
    assert code == 0
    assert "0 files added, 0 changed, 7 as they were" in out

    long = folder / "below" / "long.mp4"
    page = tmp_path / "page.html"
    words = ("search", uri, "--clip", f"{long}@2-4", "-k", "3", "--instruction", "")
    code, out, _ = gve(capsys, *words, "--json", "--html", page)
    told = json.loads(out)
    assert (code, told["exact"]) == (0, True)
    best = told["hits"][0]
    assert (best["path"], best["start_s"], best["end_s"]) == (str(long), 2.0, 4.0)
    assert best["score"] == pytest.approx(1.0, abs=1e-5)
    assert 'long.mp4#t=2.000,4.000"' in page.read_text()
    code, out, _ = gve(capsys, "search", uri, "a red circle", "--image", _picture(tmp_path), "--filter", "width < 10")
    assert code == 0
    assert "score" in out

    for refused, message in (
        (("search", uri, "x", "--frames", "4"), "their vectors do not compare"),
        (("index", folder, "--out", uri, "--window", "4"), "build another index"),
        (("search", uri), "nothing is asked"),
        (("search", uri, "x", "-k", "0"), "at least 1"),
        (("search", tmp_path / "none", "x"), "there is no index"),
        (("search", uri, "--clip", tmp_path / "none.mp4"), "the query cannot be read"),
        (("index", folder, "--out", tmp_path / "other"), "a new index needs --model"),
        (("index", tmp_path / "nowhere", "--out", uri), "does not exist"),
    ):
        code, _, err = gve(capsys, *refused)
        assert (code, message in err.splitlines()[-1]) == (2, True), err


def test_an_empty_index_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_dual_encoder(tmp_path / "model", "clip")
    (tmp_path / "text.mp4").write_text("no video")
    code, out, err = gve(
        capsys, "index", tmp_path / "text.mp4", "--out", tmp_path / "index", "--model", model, "--num-workers", "0"
    )
    assert (code, "no video: 1" in out) == (1, True)
    assert err.splitlines()[-1].startswith("gve index: the index is empty")


def _picture(folder: Path) -> Path:
    import PIL.Image

    path = folder / "picture.png"
    PIL.Image.fromarray(np.full((40, 50, 3), 90, np.uint8)).save(path)
    return path
