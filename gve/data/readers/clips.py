"""Text to clip, one annotation row a clip: WebVid, InternVid, VAST. The clips are files that the user has."""

from __future__ import annotations

import csv
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from gve.data.readers.rows import (
    Dropped,
    FolderReader,
    ReaderOptions,
    Row,
    RowError,
    fields,
    json_rows,
    mark,
    media_path,
)
from gve.data.schema import ShardError
from gve.items import Item, Pair, Text, Video


class ClipReader(FolderReader):
    """Common part: a caption and the file of a clip.

    Args:
        options: `media` defaults to the folder `videos` of the data set if there is one, else to the data set.
    """

    tasks = ("T2V",)
    media_name: ClassVar[str]
    """Default name of a clip's file, with the fields of its row in braces."""

    def __init__(self, options: ReaderOptions) -> None:
        super().__init__(options)
        folder = options.folder if options.folder.is_dir() else options.folder.parent
        self._media = options.media or (folder / "videos" if (folder / "videos").is_dir() else folder)
        if not self._media.is_dir():
            raise ShardError(f"{self._media} is no folder: give the folder of the clips by --media")
        self._template = options.media_name or self.media_name

    def rows(self, *, media: bool = True) -> Iterator[tuple[int, Row]]:
        for number, record in enumerate(self._records(), 1):
            try:
                yield number, self._row(record)
            except RowError as error:
                yield number, error

    def _records(self) -> Iterator[Any]:
        raise NotImplementedError

    def _row(self, record: Any) -> Row:
        raise NotImplementedError

    def _pair(self, key: str, caption: str, names: Mapping[str, Any]) -> Pair:
        try:
            name = self._template.format_map(names).lstrip("/")
        except (KeyError, ValueError, IndexError, AttributeError) as error:
            raise ShardError(
                f"media name {self._template!r}: {error} is no field of a row: {', '.join(map(str, names))}"
            ) from None
        clip = Video(media_path(self._media, name), name=name)
        return Pair(Item((Text(caption.strip()),)), Item((clip,)), key=key, source=self.options.source, task=self.task)


class WebVid(ClipReader):
    """WebVid: csv files `videoid,contentUrl,duration,page_dir,name`, clips at `<page_dir>/<videoid>.mp4`.

    The csv files are `*.csv` of the folder, else `data/train/partitions/*.csv`; a single file may be given instead.
    Captions that more than one video has are dropped, all of them (gve.md section 5), and rows that repeat a video.
    That takes a first reading of all files, with some 60 bytes of memory a row while it lasts.
    """

    media_name = "{page_dir}/{videoid}.mp4"

    def __init__(self, options: ReaderOptions) -> None:
        super().__init__(options)
        self._files = self.files("*.csv", "data/train/partitions/*.csv")
        self._shared: np.ndarray | None = None
        self._repeated: frozenset[int] = frozenset()

    def rows(self, *, media: bool = True) -> Iterator[tuple[int, Row]]:
        if self._shared is None:
            self._shared, self._repeated = self._find_repeats()
        self._met: set[int] = set()
        return super().rows(media=media)

    def _records(self) -> Iterator[Mapping[str, str]]:
        for path in self._files:
            try:
                with open(path, encoding="utf-8-sig", newline="") as file:
                    reader = csv.DictReader(file)
                    absent = {"videoid", "page_dir", "name"} - set(reader.fieldnames or ())
                    if absent:
                        raise ShardError(f"{path}: no WebVid csv, it lacks the columns {', '.join(sorted(absent))}")
                    yield from reader
            except (UnicodeDecodeError, csv.Error) as error:
                raise ShardError(f"{path} cannot be read as csv: {error}") from error

    def _row(self, record: Any) -> Row:
        video, caption = fields(record, "videoid", "name")
        assert self._shared is not None
        place = int(np.searchsorted(self._shared, np.uint64(mark(caption.strip()))))
        if place < len(self._shared) and int(self._shared[place]) == mark(caption.strip()):
            return Dropped("shared-caption")
        if (key := mark(video)) in self._repeated:
            if key in self._met:
                return Dropped("repeated-video")
            self._met.add(key)
        page = record["page_dir"] or ""  # empty and NaN: the clip lies at the top
        return self._pair(video, caption, {**record, "page_dir": "" if page.lower() == "nan" else page})

    def _find_repeats(self) -> tuple[np.ndarray, frozenset[int]]:
        """(sorted hashes of the captions of more than one video, hashes of the videos of more than one row)."""
        hashes = array("Q")
        for record in self._records():
            if record.get("videoid") and record.get("name"):
                hashes.extend((mark(record["name"].strip()), mark(record["videoid"])))
        both = np.frombuffer(hashes, np.uint64).reshape(-1, 2) if hashes else np.empty((0, 2), np.uint64)
        videos, rows = np.unique(both[:, 1], return_counts=True)
        repeated = frozenset(videos[rows > 1].tolist())
        captions, rows = np.unique(both[:, 0], return_counts=True)
        # One video that has its caption twice shares it with nobody: count the videos of what is there more than once.
        several = np.unique(both[np.isin(both[:, 0], captions[rows > 1])], axis=0)
        captions, owners = np.unique(several[:, 0], return_counts=True)
        return captions[owners > 1], repeated


class InternVid(ClipReader):
    """InternVid-FLT: jsonl `YoutubeID, Start_timestamp, End_timestamp, Caption, UMT_Score, Aesthetic_Score`.

    Files named `*flt*.jsonl` if there are some, else `*.jsonl`. No clip ships with it; several clips come from one
    video, so a clip's key is id, start and end, and so is the default name of its file. The clips that the paper leaves
    out for low quality are not published: `drop_list` names them, by key or by video id.
    """

    media_name = "{YoutubeID}_{Start_timestamp}_{End_timestamp}.mp4"

    def __init__(self, options: ReaderOptions) -> None:
        super().__init__(options)
        self._files = self.files("*[fF][lL][tT]*.jsonl", "*.jsonl")
        self._drop: frozenset[str] = frozenset()
        if options.drop_list is not None:
            self._drop = _lines(options.drop_list)

    def _records(self) -> Iterator[Any]:
        for path in self._files:
            yield from json_rows(path)

    def _row(self, record: Any) -> Row:
        video, start, end, caption = fields(record, "YoutubeID", "Start_timestamp", "End_timestamp", "Caption")
        key = f"{video}_{start}_{end}"
        if video in self._drop or key in self._drop:
            return Dropped("low-quality")
        return self._pair(key, str(caption), record)


class Vast(ClipReader):
    """VAST: JSON lines or arrays with `clip_id` and `vision_cap`, a list of captions; clips at `<clip_id>.mp4`.

    One caption of several is taken, by the seed and the clip's id (paper: at random).
    """

    media_name = "{clip_id}.mp4"

    def __init__(self, options: ReaderOptions) -> None:
        super().__init__(options)
        self._files = self.files("*.jsonl", "*.json")

    def _records(self) -> Iterator[Any]:
        for path in self._files:
            yield from json_rows(path)

    def _row(self, record: Any) -> Row:
        clip, captions = fields(record, "clip_id", "vision_cap")
        if isinstance(captions, str):
            captions = [captions]
        captions = [text for text in captions if isinstance(text, str) and text.strip()]
        if not captions:
            raise RowError(f"{clip}: vision_cap holds no caption", "empty-text")
        return self._pair(str(clip), captions[self.pick(len(captions), str(clip))], record)


def _lines(path: Path) -> frozenset[str]:
    try:
        return frozenset(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ShardError(f"drop list {path} cannot be read: {error}") from error
