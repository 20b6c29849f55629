"""A folder or csv of videos: which can be used, what is said about them, which train and which test."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gve.encode.encoder import progress_bar
from gve.eval.builders.i2v import cut_frame
from gve.eval.results import write_whole
from gve.eval.uvrb import find_record
from gve.items import InputError
from gve.search.files import look_into, printable, sha256_of, walk
from gve.video import MediaError

SPLIT = "split.json"
TRAIN = "train.jsonl"
WEAK = "train.csv"
SOURCES = {"T2V": "own_t2v", "I2V": "own_i2v"}
"""Task -> training source of its pairs."""
ASKS_LIKE = {"T2V": "MSRVTT", "I2V": "MSRVTT-I2V"}
"""Task -> set of UVRB with the same form, whose instruction is used."""
FEWEST = 4  # usable videos: two to train on and two to tell apart
_VIDEO_COLUMNS = ("video", "path", "file", "filename", "file_name", "video_path")
_CAPTION_COLUMNS = ("caption", "text", "sentence", "description")
_CAPTION_WORDS = 4  # fewest words of a file name that reads as a caption


@dataclass(frozen=True)
class OwnVideo:
    """One video of the user's.

    Args:
        path: absolute; of several files with the same bytes the first.
        sha256: hex hash of its bytes.
        captions: what is said about it, without repetition; of all files with its bytes.
        frame: a picture that was cut from it.
        test: whether it is held out.
    """

    path: str
    sha256: str
    captions: tuple[str, ...]
    frame: str
    test: bool


@dataclass(frozen=True)
class Split:
    """The usable videos, in the order of their hashes.

    Args:
        videos: each content once.
        rejected: printable name -> why it cannot be used.
        facts: what decided the split: source, seed, share, duplicates.
    """

    videos: tuple[OwnVideo, ...]
    rejected: dict[str, str]
    facts: dict[str, Any]

    def of(self, test: bool) -> list[OwnVideo]:
        """The videos of one side."""
        return [video for video in self.videos if video.test == test]


def caption_of_name(path: str) -> str:
    """The caption that a file's name is, or nothing: at least four words of letters alone, but for numbers at the end.

    "a_red-bud opens_2.mp4" is one; "IMG_0042.mov" and "talk_720p_final_version_a.mp4" are none.
    """
    words = [word for word in re.split(r"[\s_.,-]+", Path(path).stem) if word]
    while words and words[-1].isdigit():
        words.pop()
    plain = all(re.fullmatch(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)?", word) for word in words)
    return " ".join(words) if plain and len(words) >= _CAPTION_WORDS else ""


def prepare(source: Path, out: Path, *, test_share: float, seed: int, jobs: int = 2, progress: bool = True) -> Split:
    """Checks the videos, holds some out, cuts a frame of each and writes the training pairs.

    Videos with the same bytes are one video, so none stands on both sides. Which are held out is decided by the seed
    and the content, and by no name.

    Args:
        source: folder of videos, or a csv with the columns `video` (relative to the csv) and maybe `caption`; a video
            may have several rows. In a folder a caption is a file's name where it reads as one.
        out: gets split.json, frames/, train.jsonl for `gve shards build`, train.csv for `gve synth run`.
        test_share: of the videos that are held out; at least two are, and two are not.
        seed: of the split and the frames.
        jobs: files looked into at a time.

    Raises:
        InputError: the source cannot be read, fewer than four videos can be used, or `out` holds another split.
    """
    if not 0 < test_share < 1:
        raise InputError(f"--test-share {test_share:g} must be between 0 and 1")
    listed = list(_from_csv(source)) if source.is_file() else list(_from_folder(source, out))
    if not listed:
        raise InputError(f"{printable(os.fsencode(source))} holds no files")
    facts: dict[str, Any] = {"format": 1, "source": os.path.abspath(source), "seed": seed, "test_share": test_share}
    facts["listing"] = _stamp(listed)
    if (out / SPLIT).is_file():
        known = read_split(out)
        if {key: known.facts.get(key) for key in facts} != facts:
            raise InputError(
                f"{out} was made from other videos, captions or settings; name another folder, or delete it"
            )
        return known
    (out / "frames").mkdir(parents=True, exist_ok=True)
    captions: dict[str, dict[str, None]] = {}
    paths: dict[str, str] = {}
    rejected: dict[str, str] = {}
    by_path: dict[str, list[str]] = {}
    for path, caption in listed:
        by_path.setdefault(path, []).append(caption)

    def check(path: str) -> str | MediaError:
        """The hash of a video that can be used, its frame cut; or why it cannot."""
        try:
            look_into(os.fsencode(path))
            digest = sha256_of(os.fsencode(path))
            if not (frame := out / "frames" / f"{digest[:32]}.jpg").is_file():
                cut_frame(Path(path), frame, seed)
        except MediaError as error:
            return error
        return digest

    with progress_bar("checking videos" if progress else "", len(by_path)) as advance, ThreadPoolExecutor(jobs) as pool:
        for path, found in zip(by_path, pool.map(check, by_path), strict=True):
            advance(1)
            if isinstance(found, MediaError):
                rejected[printable(os.fsencode(path))] = str(found)
                continue
            paths.setdefault(found, path)
            captions.setdefault(found, {}).update(dict.fromkeys(caption for caption in by_path[path] if caption))
    if len(paths) < FEWEST:
        why = f"; {next(iter(rejected.values()))}" if rejected else ""
        raise InputError(
            f"{len(paths)} different videos of {len(by_path)} files can be used, {FEWEST} are needed to train and "
            f"test{why}"
        )
    facts["duplicates"] = len(by_path) - len(rejected) - len(paths)
    drawn = sorted(paths, key=lambda digest: hashlib.sha256(f"split\0{seed}\0{digest}".encode()).digest())
    held_out = set(drawn[: min(max(2, round(test_share * len(drawn))), len(drawn) - 2)])
    videos = tuple(
        OwnVideo(
            paths[digest],
            digest,
            tuple(captions[digest]),
            str((out / "frames" / f"{digest[:32]}.jpg").absolute()),
            digest in held_out,
        )
        for digest in sorted(paths)
    )
    split = Split(videos, rejected, facts)
    lines = "".join(json.dumps(pair) + "\n" for pair in _pairs(split.of(test=False)))
    write_whole(out / TRAIN, lines.encode())
    write_whole(out / WEAK, _weak(split.of(test=False)).encode("utf-8", "surrogateescape"))
    record = {**facts, "videos": [vars(video) for video in videos], "rejected": rejected}
    write_whole(out / SPLIT, (json.dumps(record, indent=1) + "\n").encode())
    return split


def read_split(out: Path) -> Split:
    """What `prepare` has written.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    try:
        record = json.loads((out / SPLIT).read_text())
        videos = tuple(OwnVideo(**{**one, "captions": tuple(one["captions"])}) for one in record.pop("videos"))
        return Split(videos, record.pop("rejected"), record)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{out / SPLIT} is no split of own_videos: {error}") from None


def _pairs(videos: Sequence[OwnVideo]) -> Iterator[dict[str, Any]]:
    """Rows for `gve shards build`: every caption asks for its video, and a frame of every video does."""
    for video in videos:
        for task, queries in (
            ("T2V", [{"text": caption} for caption in video.captions]),
            ("I2V", [{"image": video.frame}]),
        ):
            for query in queries:
                yield {
                    "query": query,
                    "target": {"video": video.path},
                    "source": SOURCES[task],
                    "instruction": find_record(ASKS_LIKE[task]).instruction,
                }


def _weak(videos: Sequence[OwnVideo]) -> str:
    """The same videos as weak pairs, one a row: what a captioner starts from."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["id", "video", "caption"])
    rows.writerows([video.sha256[:16], video.path, " ".join(video.captions)] for video in videos)
    return text.getvalue()


def _stamp(listed: Sequence[tuple[str, str]]) -> str:
    """Hex SHA-256 of the paths, their sizes and times of change, and captions."""
    digest = hashlib.sha256()
    for path, caption in listed:
        status = os.stat(path) if os.path.isfile(path) else None
        state = (status.st_size, status.st_mtime_ns) if status else None
        digest.update(repr((os.fsencode(path), state, caption)).encode())
    return digest.hexdigest()


def _from_folder(folder: Path, out: Path) -> Iterator[tuple[str, str]]:
    """(Path, caption of its name) of the files that are no text of any kind."""
    for found in walk([folder], leave_out=[out]).found:
        path = os.fsdecode(found.path)
        yield path, caption_of_name(path)


def _from_csv(listing: Path) -> Iterator[tuple[str, str]]:
    """(Path, caption) of the rows."""
    try:
        with open(listing, encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            video, caption = (
                next((name for name in names if name in (rows.fieldnames or ())), "")
                for names in (_VIDEO_COLUMNS, _CAPTION_COLUMNS)
            )
            if not video:
                raise InputError(
                    f"{listing} has no column {' or '.join(_VIDEO_COLUMNS[:3])}: "
                    f"{', '.join(map(str, rows.fieldnames or ()))[:80]}"
                )
            for row in rows:
                if row[video]:
                    path = os.path.abspath(listing.parent / row[video])
                    yield path, " ".join((row.get(caption) or "").split())
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{listing} is no csv in UTF-8: {error}") from None
    except OSError as error:
        raise InputError(f"{listing} cannot be read: {error.strerror}") from None
