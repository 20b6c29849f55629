"""What a model found, to be looked at: the best and the worst queries of a set beside their nearest results."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from gve.encode.encoder import progress_bar
from gve.eval.results import SavedResults, SavedScore
from gve.eval.uvrb import RetrievalSet, UVRBReader
from gve.items import Image, InputError, Item, Video
from gve.video import MediaError, Sampling, decode_guarded, decode_image, encode_jpeg

SHEET_PX = (176, 132)  # width, height of a thumbnail; a clip is four frames in two rows
SHEET_FRAMES, GAP_PX = 4, 2
JPEG_QUALITY = 72
MAX_PICTURE_BYTES = 24 << 20
"""The most bytes of JPEG on one page; base64 makes a third more of them. What comes later is named, not shown."""
TEXT_SHOWN = 420  # characters of a query; a detailed caption has thousands


@dataclass(frozen=True)
class Card:
    """One thing to look at.

    Args:
        id: of the item.
        text: its words, cut to TEXT_SHOWN characters.
        words: number of its words.
        pictures: media keys, looked up in `Thumbnails`.
        place: in the ranking, 1 the first; 0 for a query, or an answer beyond the results that were kept.
        similarity: to the query; None where it was not kept.
        positive: it answers the query.
    """

    id: str
    text: str = ""
    words: int = 0
    pictures: tuple[str, ...] = ()
    place: int = 0
    similarity: float | None = None
    positive: bool = False


@dataclass(frozen=True)
class Shown:
    """One query with its nearest results.

    Args:
        query: the query.
        hit: its score, an expectation over ties.
        standing: where its best positive stands, in words.
        results: the nearest, best first.
        answer: a positive, where none is among the results.
    """

    query: Card
    hit: float
    standing: str
    results: tuple[Card, ...]
    answer: Card | None


@dataclass(frozen=True)
class SetGallery:
    """The queries shown of one set; `lacks` says why there is no content to show, if so."""

    name: str
    instruction: str
    value: float
    best: tuple[Shown, ...]
    worst: tuple[Shown, ...]
    lacks: str = ""


def choose_queries(score: SavedScore, count: int) -> tuple[list[int], list[int]]:
    """(best, worst) rows of queries; equal ones by id, so that a page can be made again.

    Best: answered, by the similarity that their first positive has over the first result that is none. Worst: not
    answered, by how many candidates stand before the best positive. Queries without a readable positive are neither.
    """
    ids = score.queries.tolist()
    known = [row for row in range(len(ids)) if score.tied_positives[row] > 0]
    best = sorted((row for row in known if score.hits[row] > 0), key=lambda row: (*_ease(score, row), ids[row]))[:count]
    before = score.greater + (score.tied - score.tied_positives) / 2
    worst = sorted(
        (row for row in known if score.hits[row] < 1 and row not in best), key=lambda row: (-before[row], ids[row])
    )
    return best, worst[:count]


def _ease(score: SavedScore, row: int) -> tuple[float, float]:
    """Sort key, least for the clearest hit: minus its score, minus its margin."""
    answers = set(score.positives[row].tolist())
    near = [(place, float(s)) for place, s in zip(score.nearest[row].tolist(), score.similarities[row], strict=True)]
    own = [similarity for place, similarity in near if place in answers]
    others = [similarity for place, similarity in near if place >= 0 and place not in answers]
    margin = max(own) - max(others) if own and others else 0.0
    return -float(score.hits[row]), -margin


def _standing(score: SavedScore, row: int) -> str:
    first = int(score.greater[row]) + 1
    last = int(score.greater[row] + score.tied[row] - score.tied_positives[row]) + 1
    of = score.row["n_candidates"]
    return f"place {first:,} of {of:,}" if first == last else f"between places {first:,} and {last:,} of {of:,} (ties)"


class Thumbnails:
    """JPEG pictures of media as data URIs, each decoded and embedded once: an image, or four frames of a clip.

    Args:
        num_workers: threads that wait for the decoders, which are processes of their own.

    Attributes:
        pictures: media key -> data URI.
        classes: media key -> CSS class of its picture, which many cards may show.
        failures: media key -> why there is none.
    """

    def __init__(self, num_workers: int = 2) -> None:
        self.num_workers = num_workers
        self.pictures: dict[str, str] = {}
        self.classes: dict[str, str] = {}
        self.failures: dict[str, str] = {}
        self._wanted: dict[str, Image | Video] = {}
        self._bytes = 0

    def want(self, item: Item) -> tuple[str, ...]:
        """Notes the media of an item; their keys."""
        keys = []
        for medium in item.media:
            key = f"{type(medium).__name__} {medium.name}"
            self._wanted.setdefault(key, medium)
            keys.append(key)
        return tuple(keys)

    def decode(self, progress: str = "") -> None:
        """Makes the pictures that were noted; those that cannot be made stand in `failures` with the reason."""
        todo = {key: medium for key, medium in self._wanted.items() if key not in self.pictures | self.failures}
        with ThreadPoolExecutor(self.num_workers) as pool, progress_bar(progress, len(todo)) as advance:
            for key, made in zip(todo, pool.map(_picture, todo.values()), strict=True):
                advance(1)
                if isinstance(made, str):
                    self.failures[key] = made
                elif self._bytes + len(made) > MAX_PICTURE_BYTES:
                    self.failures[key] = f"left out: the page holds {MAX_PICTURE_BYTES >> 20} MiB of pictures already"
                else:
                    self._bytes += len(made)
                    self.classes[key] = f"p{len(self.pictures)}"
                    self.pictures[key] = "data:image/jpeg;base64," + base64.b64encode(made).decode()


def _picture(medium: Image | Video) -> bytes | str:
    """JPEG bytes, or why there are none."""
    source = medium.source
    if not isinstance(source, (str, Path, bytes)):
        raise TypeError(f"{medium.name}: a gallery shows files, got {type(source).__name__}")
    try:
        if isinstance(medium, Image):
            return encode_jpeg(_fitted(decode_image(source, medium.name), *SHEET_PX), JPEG_QUALITY)
        frames = decode_guarded(source, Sampling.uniform(SHEET_FRAMES), name=medium.name).pixels
    except MediaError as error:
        return error.reason
    width, height = SHEET_PX
    sheet = np.full((height, width, 3), 255, np.uint8)
    across, down = (width - GAP_PX) // 2, (height - GAP_PX) // 2
    for place, frame in enumerate(frames):
        left, top = (across + GAP_PX) * (place % 2), (down + GAP_PX) * (place // 2)
        sheet[top : top + down, left : left + across] = _fitted(frame, across, down)
    return encode_jpeg(sheet, JPEG_QUALITY)


def _fitted(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """[height, width, 3] uint8: the picture as large as fits, on grey."""
    picture = PIL.Image.fromarray(pixels)
    picture.thumbnail((width, height))
    sheet = PIL.Image.new("RGB", (width, height), "#e4e4e4")
    sheet.paste(picture, ((width - picture.width) // 2, (height - picture.height) // 2))
    return np.asarray(sheet)


def make_gallery(
    run: SavedResults, root: str | Path | None, thumbnails: Thumbnails, *, count: int = 3, top: int = 5
) -> list[SetGallery]:
    """Best and worst queries of every set; pictures are noted in `thumbnails`, not decoded yet.

    Args:
        run: with its positions.
        root: folder of the sets; without it, or where the data have changed since, only ids are shown.
        count: best and worst queries of a set.
        top: results of a query, at most the ten that were kept.
    """
    galleries = []
    for name, score in run.sets.items():
        tested, lacks = _content(name, run.data["protocol"]["sets"][name], root)
        view = _View(score, tested, thumbnails, top)
        best, worst = choose_queries(score, count)
        galleries.append(
            SetGallery(
                name,
                run.data["protocol"]["sets"][name][2],
                score.row["value"],
                tuple(view.shown(row) for row in best),
                tuple(view.shown(row) for row in worst),
                lacks,
            )
        )
    return galleries


def _content(name: str, protocol: Sequence[Any], root: str | Path | None) -> tuple[RetrievalSet | None, str]:
    """The set's own queries and corpus, or why they cannot be shown."""
    if not root:
        return None, "the run names no folder of the sets; give --root to see queries and clips"
    try:
        tested = UVRBReader(root).read(name)
    except InputError as error:
        return None, str(error)
    if tested.data_hash != protocol[0]:
        return None, f"the listings below {root} are not those of the run"
    return tested, ""


class _View:
    """Cards of one set's queries and corpus."""

    def __init__(self, score: SavedScore, tested: RetrievalSet | None, thumbnails: Thumbnails, top: int) -> None:
        self.score, self.thumbnails, self.top = score, thumbnails, top
        self.queries: Mapping[str, Item] = {item.id: item for item in tested.queries} if tested else {}
        self.corpus: Mapping[str, Item] = {item.id: item for item in tested.corpus} if tested else {}

    def shown(self, row: int) -> Shown:
        score = self.score
        answers = score.positives[row].tolist()
        places = [place for place in score.nearest[row, : self.top].tolist() if place >= 0]
        results = tuple(
            self._card(self.corpus, score.corpus[place], number, float(similarity), place in answers)
            for number, (place, similarity) in enumerate(zip(places, score.similarities[row], strict=False), 1)
        )
        answer = None
        if not any(card.positive for card in results):
            answer = self._card(self.corpus, score.corpus[answers[0]], 0, None, True)
        query = self._card(self.queries, score.queries[row], 0, None, False)
        return Shown(query, float(score.hits[row]), _standing(score, row), results, answer)

    def _card(
        self, items: Mapping[str, Item], identifier: Any, place: int, similarity: float | None, positive: bool
    ) -> Card:
        item = items.get(str(identifier))
        if item is None:
            return Card(str(identifier), place=place, similarity=similarity, positive=positive)
        text = item.text if len(item.text) <= TEXT_SHOWN else item.text[:TEXT_SHOWN].rsplit(" ", 1)[0] + " ..."
        return Card(
            str(identifier),
            text,
            len(item.text.split()),
            self.thumbnails.want(item),
            place,
            similarity,
            positive,
        )
