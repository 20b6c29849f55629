"""What a run shares with a benchmark: word n-grams of its texts, and perceptual hashes of its videos.

What is found is a reason to leave a video out, not a proof: the list says where each id was met, so that a person can
look. A short phrase that many people would write is passed over.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gve.data.readers.rows import mark
from gve.eval.classification import CLASSIFICATION
from gve.eval.records import SETS
from gve.eval.uvrb import UVRBReader
from gve.items import Image, Text, Video
from gve.synth.audit.census import words_of
from gve.synth.audit.notes import Notes
from gve.synth.quality.hashes import COLOUR_GRID, ClipHash, bits, colour_distance
from gve.synth.units import Row
from gve.video import MediaError, Sampling, decode_guarded, decode_image

FRAMES = Sampling.uniform(8)
SHOWN_CHARS = 300


@dataclass(frozen=True)
class Thresholds:
    """From when on something is taken for the benchmark's.

    Args:
        ngram: words in a row that a text and the benchmark's share.
        min_words: shorter texts never match; texts from here to below `ngram` words match as a whole only.
        max_bits: mean distance, in bits of 64, of the hashes of frames at equal places of two videos. All of 55 copies
            (real clips encoded anew at 160 x 120, toy clips at 64 x 64) stay within 5.9.
        max_colour: largest difference of a mean level of two videos, of 255; of these copies at most 8. No two of
            11,175 pairs of toy clips and 435 of real ones are within both, but for one that is a copy.
    """

    ngram: int = 13
    min_words: int = 5
    max_bits: float = 6.0
    max_colour: float = 16.0


@dataclass(frozen=True)
class Match:
    """One thing that a run and a benchmark share.

    Args:
        id: of the weak pair; all pairs of it are left out.
        reason: "text-ngram", "text-exact" or "video".
        where: "raw caption", "video caption", "frame caption", "composed query" or "video".
        match: set and id of the benchmark's text or medium.
        score: words in common, or the mean distance in bits.
        detail: the words in common.
    """

    id: str
    reason: str
    where: str
    match: str
    score: float
    detail: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class TextIndex:
    """Word n-grams of a benchmark's texts; 12 bytes for each word. Hits are compared word by word, so none is false.

    Args:
        texts: (name, text).
        thresholds: see there.
    """

    def __init__(self, texts: Iterable[tuple[str, str]], thresholds: Thresholds) -> None:
        self._thresholds = thresholds
        self._names: list[str] = []
        self._words: list[str] = []
        self._whole: dict[str, int] = {}
        self._marks: dict[str, int] = {}
        hashes, owners = [], []
        for name, text in texts:
            words = words_of(text)
            if len(words) < thresholds.min_words:
                continue
            number = len(self._names)
            self._names.append(name)
            self._words.append(" ".join(words))
            if len(words) < thresholds.ngram:
                self._whole.setdefault(self._words[-1], number)
                continue
            hashes.append(self._rolled(words))
            owners.append(np.full(len(hashes[-1]), number, np.uint32))
        joined = np.concatenate(hashes) if hashes else np.zeros(0, np.uint64)
        order = np.argsort(joined, kind="stable")
        self._hashes = joined[order]
        self._owners = (np.concatenate(owners) if owners else np.zeros(0, np.uint32))[order]

    def __len__(self) -> int:
        return len(self._names)

    def _rolled(self, words: Sequence[str]) -> np.ndarray:
        """[L - n + 1] uint64, a polynomial of the words' hashes modulo 2^64."""
        for word in words:
            if word not in self._marks:
                self._marks[word] = mark(word) | 1
        own = np.array([self._marks[word] for word in words], np.uint64)
        n = self._thresholds.ngram
        total = np.zeros(len(own) - n + 1, np.uint64)
        for place in range(n):
            total = total * np.uint64(0x9E3779B97F4A7C15) + own[place : place + len(total)]
        return total

    def find(self, text: str) -> tuple[str, str, int, str] | None:
        """(reason, name, words in common, those words) of the first text of the benchmark that matches."""
        words = words_of(text)
        n = self._thresholds.ngram
        if len(words) < n:
            number = self._whole.get(" ".join(words))
            return None if number is None else ("text-exact", self._names[number], len(words), " ".join(words))
        if not len(self._hashes):
            return None
        hashes = self._rolled(words)
        places = np.searchsorted(self._hashes, hashes)
        for begin in np.flatnonzero(self._hashes[np.minimum(places, len(self._hashes) - 1)] == hashes):
            shared = " ".join(words[begin : begin + n])
            for place in range(int(places[begin]), len(self._hashes)):
                if self._hashes[place] != hashes[begin]:
                    break
                theirs = self._words[self._owners[place]]
                if f" {shared} " in f" {theirs} ":
                    end = int(begin) + n  # as far as both go on alike
                    while end < len(words) and f" {shared} {words[end]} " in f" {theirs} ":
                        shared, end = f"{shared} {words[end]}", end + 1
                    return "text-ngram", self._names[self._owners[place]], end - int(begin), shared
        return None


def texts_of(row: Row) -> Iterator[tuple[str, str]]:
    """(where, text) of everything that is said of a video, by its source too: a row of `enrich`."""
    if row["caption"]:
        yield "raw caption", row["caption"]
    enrichment = row["enrichment"]
    yield from (("video caption", caption["text"]) for caption in enrichment["captions"])
    if frame := enrichment.get("frame"):
        yield from (("frame caption", caption["text"]) for caption in frame["captions"])
    yield from (("composed query", query["text"]) for query in enrichment.get("composed", {}).values())


def find_texts(row: Row, index: TextIndex) -> list[Match]:
    """The first match of each place of a row where a text stands."""
    found: dict[str, Match] = {}
    for where, text in texts_of(row):
        if where not in found and (hit := index.find(text)):
            reason, name, count, words = hit
            found[where] = Match(row["id"], reason, where, name, float(count), words[:SHOWN_CHARS])
    return list(found.values())


@dataclass(frozen=True, eq=False)
class Benchmark:
    """Texts and media of UVRB folders.

    Args:
        texts: (set/listing/id, text).
        media: set/name of the file -> picture or clip, each file once.
    """

    texts: Sequence[tuple[str, str]]
    media: Mapping[str, Image | Video]

    @classmethod
    def read(cls, roots: Iterable[str | Path]) -> Benchmark:
        """All sets of all folders, those of classification too.

        Raises:
            InputError: a folder holds no set, or a listing cannot be read.
        """
        texts: list[tuple[str, str]] = []
        media: dict[str, Image | Video] = {}
        for root in roots:
            reader = UVRBReader(root)
            seen = set[int]()
            for name in reader.names((*SETS, *CLASSIFICATION)):
                tested = reader.read(name)
                for listing, items in (("queries", tested.queries), ("corpus", tested.corpus)):
                    for item in items:
                        texts += [
                            (f"{name}/{listing}/{item.id}", part.text) for part in item.parts if isinstance(part, Text)
                        ]
                        for medium in item.media:
                            if id(medium) not in seen:
                                seen.add(id(medium))
                                media.setdefault(f"{name}/{medium.name.removeprefix(name + '/')}", medium)
        return cls(texts, media)


def hash_medium(medium: Image | Video) -> str:
    """The signature of a clip by eight frames in the order of time, or of a picture as its only frame.

    Raises:
        MediaError: it cannot be decoded.
    """
    source = medium.source
    assert isinstance(source, (str, Path, bytes))
    if isinstance(medium, Image):
        return str(ClipHash.of(decode_image(source, medium.name)[None]))
    return str(ClipHash.of(decode_guarded(source, FRAMES, name=medium.name).pixels))


def hash_of_scan(row: Row) -> str:
    """The signature that stage 1 has stored with a row; empty where it has none of eight frames."""
    stored = str(row.get("quality", {}).get("hash", ""))
    return stored if len(stored.partition(":")[0]) == 16 * FRAMES.num_frames else ""


class FrameIndex:
    """Signatures of a benchmark's clips and pictures; a look-up compares with all of them: 0.1 ms a thousand clips.

    Args:
        hashes: name -> signature.
        thresholds: see there.
    """

    def __init__(self, hashes: Mapping[str, str], thresholds: Thresholds) -> None:
        self._thresholds = thresholds
        by_frames: dict[int, dict[str, ClipHash]] = {}
        for name, text in hashes.items():
            signature = ClipHash.from_text(text)
            by_frames.setdefault(len(signature.frames), {})[name] = signature
        self._tables = [
            (list(own), np.stack([one.frames for one in own.values()]), np.stack([one.colours for one in own.values()]))
            for own in by_frames.values()
        ]

    def find(self, signature: str) -> tuple[str, float] | None:
        """(name, mean distance in bits) of the nearest clip, or of a picture that is one of the frames; None beyond."""
        own = ClipHash.from_text(signature)
        best: tuple[float, str] | None = None
        for names, frames, colours in self._tables:
            if frames.shape[1] == 1:
                distance = self._of_pictures(own, frames, colours)
            else:
                near = colour_distance(own.colours, colours) <= self._thresholds.max_colour
                distance = np.where(near, bits(own.frames, frames), np.inf)
            place = int(distance.argmin())
            if distance[place] <= self._thresholds.max_bits and (best is None or distance[place] < best[0]):
                best = float(distance[place]), names[place]
        return (best[1], best[0]) if best else None

    def _of_pictures(self, own: ClipHash, frames: np.ndarray, colours: np.ndarray) -> np.ndarray:
        """[N] distance of each picture to the nearest frame that is as light and as dark in the same places."""
        cells = COLOUR_GRID**2
        greys = own.colours[-cells * len(own.frames) :].reshape(-1, 1, cells)
        near = colour_distance(greys, colours[:, -cells:]) <= self._thresholds.max_colour  # [T, N]
        return np.where(near, np.bitwise_count(own.frames[:, None] ^ frames[:, 0]), np.inf).min(0)


def hash_all(
    media: Iterable[tuple[str, Callable[[], Image | Video]]], notes: Notes, jobs: int, advance: Callable[[], object]
) -> Iterator[tuple[str, str, str]]:
    """(name, signature, or why there is none) of media, in order; `jobs` are decoded side by side.

    Args:
        media: name, and what opens the medium.
        notes: of signatures; a file that is the same as before is not decoded again.
        jobs: threads that wait for the decoders, which are processes of their own.
        advance: called after each.
    """

    def one(entry: tuple[str, Callable[[], Image | Video]]) -> tuple[str, str, str]:
        name, opened = entry
        try:
            medium = opened()
            key = _key(name, medium)
            signature = notes.get(key)
            if signature is None:
                signature = hash_medium(medium)
                notes.put(key, signature)
        except MediaError as error:
            return name, "", error.reason
        except FileNotFoundError:
            return name, "", "missing"
        return name, signature, ""

    waiting: deque[Future[tuple[str, str, str]]] = deque()
    pool = ThreadPoolExecutor(jobs)
    try:
        for entry in media:
            waiting.append(pool.submit(one, entry))
            if len(waiting) > 2 * jobs:
                yield waiting.popleft().result()
                advance()
        while waiting:
            yield waiting.popleft().result()
            advance()
    finally:
        pool.shutdown(cancel_futures=True)


def _key(name: str, medium: Image | Video) -> str:
    """What the bytes are known by: their hash where they are at hand or it is known, else path, size and time."""
    how = f"dHash and levels, {FRAMES}"
    source = medium.source
    if medium.sha256 or isinstance(source, bytes):
        return f"{how} {medium.content_hash()}"
    assert isinstance(source, (str, Path))
    about = Path(source).stat()
    return f"{how} {source} {about.st_size} {about.st_mtime_ns}"
