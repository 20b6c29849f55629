"""Where weak pairs come from: folders, lists, tars, and the layouts of WebVid, InternVid and PE-Video.

Only annotations are read here. Media are named by locators and opened by the steps that look at them, so a clip inside
a tar is never unpacked.
"""

from __future__ import annotations

import csv
import json
import mmap
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from gve.data.readers import Dropped, ReaderOptions, RowError, open_reader
from gve.data.readers.pe_video import PEVideo
from gve.data.readers.rows import json_rows, mark, media_path
from gve.data.schema import ShardError, decode_sample
from gve.data.shards import tar_members
from gve.data.sources import open_sources
from gve.items import InputError, Pair
from gve.synth.records import Reject
from gve.synth.units import Context, Outcome, Row, Scope, execution

Kind = Literal["auto", "folder", "list", "shards", "gve", "webvid", "internvid", "pe_video"]

VIDEO_SUFFIXES = frozenset(
    ".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .m2v .ts .mts .flv .wmv .3gp .ogv .gif".split()  # noqa: SIM905
)
_LISTS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
_NAMES = {
    "id": ("id", "video_id", "videoid", "clip_id", "key"),
    "video": ("video", "path", "file", "video_path", "filename", "file_name", "clip"),
    "caption": ("caption", "text", "sentence", "description", "title"),
    "start": ("start_s", "start", "start_time"),
    "end": ("end_s", "end", "end_time"),
}
"""Columns that are looked for where the configuration names none; the first one that is there is taken."""


@dataclass(frozen=True)
class Columns:
    """Which column, or key of a JSON object, holds what; empty ones are found by their usual names.

    Args:
        id: a value that no other row has; without such a column the video's path and span name a row.
        video: path of the file, relative to `media`.
        caption: the weak text; a list of strings is joined by blanks.
        start, end: the span of the file that is meant, in seconds or as HH:MM:SS.mmm.
        meta: further columns that are kept with the pair.
    """

    id: str = ""
    video: str = ""
    caption: str = ""
    start: str = ""
    end: str = ""
    meta: tuple[str, ...] = ()


@dataclass(frozen=True)
class SourceOptions:
    """One source of weak pairs.

    Args:
        path: a folder, a list, a tar or a data set's own folder.
        kind: "folder": all videos below it, captions in files of the same name with .txt or .json; "list": csv, tsv,
            jsonl, json or parquet with one video a row; "shards": WebDataset tars, captions as txt or json members;
            "gve": shards of `gve shards` with original videos, of which text-to-video pairs are read; "webvid",
            "internvid", "pe_video": as published; "auto" tells them apart.
        name: what ids begin with, unique in the run; made from the path when empty.
        licence: of the source, for the data card.
        media: folder of the videos; beside the list, or as each layout has it, when not given.
        media_name: name of a video's file with the columns of its row in braces, for example "{videoid}.mp4".
        columns: of lists, and keys of the json members of shards.
        drop_list: file with a key a line that is left out (internvid).
        limit: reads only so many rows, for a trial; 0 reads all.
    """

    path: Path
    kind: Kind = "auto"
    name: str = ""
    licence: str = execution("not stated")
    media: Path | None = None
    media_name: str = ""
    columns: Columns = Columns()
    drop_list: Path | None = None
    limit: int = 0


@dataclass(frozen=True)
class InputOptions:
    """The sources of a run.

    Args:
        sources: at least one.
    """

    sources: tuple[SourceOptions, ...] = field(default=())


@dataclass(frozen=True)
class Found:
    """One row of a source.

    Args:
        key: names it in its source.
        video: locator.
        caption: as it stands there.
        start_s, end_s: the span that is meant.
        meta: what else it says.
        named: whether the source itself gives the key, so that a second row of this key is a fault.
    """

    key: str
    video: dict[str, Any]
    caption: str
    start_s: float | None = None
    end_s: float | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    named: bool = True


Record = Found | RowError | Dropped


class Input:
    """The first step: every row of every source becomes a weak pair or a reject.

    Memory: 70 bytes a row, for ids that appear twice.
    """

    Options: ClassVar[type] = InputOptions
    scope: ClassVar[Scope] = "run"

    def __init__(self, options: InputOptions, context: Context) -> None:
        if not options.sources:
            raise InputError("no source is given: name one by `input: {sources: [{path: ...}]}`")
        self._sources = {source_name(source): source for source in options.sources}
        if len(self._sources) != len(options.sources):
            raise InputError(
                f"two sources have one name ({', '.join(map(source_name, options.sources))}): give each a `name`"
            )

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        return {}

    def run(self, rows: Iterable[Row]) -> Iterator[Outcome]:
        passed, first = 0, ""
        for name, source in self._sources.items():
            seen: set[int] = set()
            for number, record in enumerate(read(source, name), 1):
                outcome = _outcome(name, number, record, seen)
                passed += len(outcome.rows)
                if not first and outcome.rejects:
                    first = f"{outcome.rejects[0].reason}: {outcome.rejects[0].detail}"
                yield outcome
                if number == source.limit:
                    break
        if not passed:
            paths = ", ".join(str(source.path) for source in self._sources.values())
            raise InputError(f"{paths}: no row can be used ({first or 'there is none'})")


def _outcome(source: str, number: int, record: Record, seen: set[int]) -> Outcome:
    if not isinstance(record, Found):
        id = f"{source}:row-{number}"
        return Outcome(id, rejects=(Reject(id, "input", record.reason, detail=_detail(record)),))
    id = f"{source}:{record.key}"
    if mark(id) in seen:  # a chance of 3 in a million among ten million rows to take two ids for one
        id = f"{id}#{number}"
        if record.named:
            detail = f"row {number} has the id {record.key} of a row before"
            return Outcome(id, rejects=(Reject(id, "input", "repeated-id", detail=detail),))
    seen.add(mark(id))
    row = {
        "id": id,
        "source": source,
        "video": record.video,
        "caption": record.caption,
        "start_s": record.start_s,
        "end_s": record.end_s,
        "meta": dict(record.meta),
    }
    return Outcome(id, (row,))


def _detail(record: RowError | Dropped) -> str:
    return str(record) if isinstance(record, RowError) else "left out by a rule of the source"


def source_name(source: SourceOptions) -> str:
    """What the ids of a source begin with."""
    return source.name or re.sub(r"[^a-z0-9_]+", "_", source.path.stem.lower()) or "source"


def read(source: SourceOptions, name: str) -> Iterator[Record]:
    """The rows of a source, in the same order at every call.

    Raises:
        InputError: it does not exist, or is not what its kind says.
    """
    if re.match(r"[a-z][a-z0-9+]+:/", str(source.path)):  # a path keeps one of the two slashes
        raise InputError(f"{source.path}: sources are read from local files, fetch it first")
    if not source.path.exists():
        raise InputError(f"{source.path} does not exist: give the folder or list of the videos as a source's `path`")
    return _READERS[guess(source) if source.kind == "auto" else source.kind](source, name)


def guess(source: SourceOptions) -> str:
    """The kind of a source, from its suffix, its columns, and what lies in its folder.

    Raises:
        InputError: it is a file of no known kind.
    """
    path = source.path
    if path.is_dir():
        if (path / "manifest.json").is_file() and any(path.glob("level*/*/*.tar")):
            return "gve"
        return "shards" if any(path.glob("*.tar")) else "folder"
    if path.suffix == ".tar":
        return "shards"
    if path.suffix.lower() not in _LISTS:
        raise InputError(f"{path} is no list ({', '.join(_LISTS)}), tar or folder: name its `kind`, or convert it")
    first = next((row for row in table(path) if isinstance(row, Mapping)), {})
    if {"videoid", "page_dir", "name"} <= set(first):
        return "webvid"
    return "internvid" if {"YoutubeID", "Start_timestamp", "Caption"} <= set(first) else "list"


# --------------------------------------------------------------------------------------------------- folders and lists


def _folder(source: SourceOptions, name: str) -> Iterator[Record]:
    root = source.path
    if not root.is_dir():
        raise InputError(f"{root} is no folder: kind folder takes all videos below one")
    for folder, below, files in os.walk(root):
        below[:] = sorted(own for own in below if not own.startswith("."))
        for file in sorted(files):
            path = Path(folder) / file
            if path.suffix.lower() not in VIDEO_SUFFIXES or file.startswith("."):
                continue
            key = path.relative_to(root).as_posix()
            try:
                yield Found(key, {"file": str(path.absolute())}, _sidecar(path))
            except (OSError, ValueError) as error:
                yield RowError(f"caption of {key}: {error}", "caption-file")


def _sidecar(path: Path) -> str:
    """The caption that lies beside a video; empty where there is none."""
    text, record = path.with_suffix(".txt"), path.with_suffix(".json")
    if text.is_file():
        return text.read_text(encoding="utf-8-sig").strip()
    if record.is_file():
        return _caption(json.loads(record.read_text(encoding="utf-8-sig")), Columns())
    return ""


def table(path: Path) -> Iterator[Any]:
    """Rows of a csv, tsv, jsonl, json or parquet file as mappings; a RowError in place of a damaged line.

    Raises:
        InputError: the file cannot be read as what its suffix says.
    """
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            import pyarrow.parquet

            with pyarrow.parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=1024):
                    yield from batch.to_pylist()
        elif suffix in (".jsonl", ".json"):
            yield from json_rows(path)
        else:
            with open(path, encoding="utf-8-sig", newline="") as file:
                header = file.readline()
                file.seek(0)
                delimiter = max("\t" if suffix == ".tsv" else ",;\t|", key=header.count)
                yield from csv.DictReader(file, delimiter=delimiter)
    except (UnicodeDecodeError, csv.Error, OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be read as {suffix[1:]}: {' '.join(str(error).split())}") from error


def _list(source: SourceOptions, name: str) -> Iterator[Record]:
    media = source.media or source.path.parent
    for number, row in enumerate(table(source.path), 1):
        if isinstance(row, RowError):
            yield row
            continue
        if not isinstance(row, Mapping):
            yield RowError(f"row {number}: {row!r:.60} is no JSON object", "row")
            continue
        if number == 1:
            _check_columns(row, source)
        try:
            yield _listed(row, source, media)
        except RowError as error:
            yield error


def _check_columns(row: Mapping[str, Any], source: SourceOptions) -> None:
    """Raises InputError when the first row lacks a column that the configuration names, or any for the video."""
    columns = source.columns
    named = [columns.id, columns.video, columns.caption, columns.start, columns.end, *columns.meta]
    absent = [column for column in named if column and column not in row]
    if absent:
        raise InputError(f"{source.path} has no column {absent[0]!r}: it has {', '.join(map(str, row))}")
    if not source.media_name and not columns.video and not set(_NAMES["video"]) & set(row):
        raise InputError(
            f"{source.path}: which column is the video's path? it has {', '.join(map(str, row))}: name it by "
            "`columns: {video: ...}`, or give `media_name`"
        )


def _listed(row: Mapping[str, Any], source: SourceOptions, media: Path) -> Found:
    columns = source.columns
    if source.media_name:
        try:
            video = source.media_name.format_map(row)
        except (KeyError, ValueError, IndexError, AttributeError) as error:
            raise InputError(f"media_name {source.media_name!r}: {error} is no column of {source.path}") from error
    else:
        video = str(_value(row, columns.video, "video") or "")
    if not video:
        raise RowError("a row names no video", "row")
    if "://" in video:
        raise RowError(f"{video}: videos are read from local files, fetch them first", "remote")
    path = Path(video) if Path(video).is_absolute() else media_path(media, video)
    if not path.is_file():
        raise RowError(f"{path}: no such file", "missing")
    start, end = (seconds(_value(row, getattr(columns, part), part)) for part in ("start", "end"))
    if start is not None and end is not None and not 0 <= start < end:
        raise RowError(f"{video}: a span from {start} s to {end} s", "span")
    id = _value(row, columns.id, "id")
    span = "" if start is None and end is None else f"@{start or 0:g}-{'' if end is None else f'{end:g}'}"
    return Found(
        str(id) if id not in (None, "") else video + span,
        {"file": str(path.absolute())},
        _caption(row, columns),
        start,
        end,
        {column: plain(row.get(column)) for column in columns.meta},
        named=id not in (None, ""),
    )


def _value(row: Mapping[str, Any], column: str, role: str) -> Any:
    if column:
        return row.get(column)
    return next((row[usual] for usual in _NAMES[role] if usual in row), None)


def _caption(row: Any, columns: Columns) -> str:
    value = _value(row, columns.caption, "caption") if isinstance(row, Mapping) else None
    if isinstance(value, list):
        return " ".join(text.strip() for text in value if isinstance(text, str))
    return value if isinstance(value, str) else ""


def seconds(value: Any) -> float | None:
    """A time in seconds, from a number or from HH:MM:SS.mmm; None for none.

    Raises:
        RowError: it is neither.
    """
    if value is None or value == "":
        return None
    try:
        total = 0.0
        for part in str(value).split(":"):
            total = total * 60 + float(part)
    except ValueError:
        raise RowError(f"{value!r:.40} is no time: write seconds or HH:MM:SS.mmm", "span") from None
    if not 0 <= total < float("inf"):
        raise RowError(f"{value!r:.40} is no time from 0 on", "span")
    return total


def plain(value: Any) -> Any:
    """The value as plain JSON; dates and the like as text."""
    return json.loads(json.dumps(value, default=str)) if value == value else None  # NaN is no JSON


# ----------------------------------------------------------------------------------------------------------------- tars


def _tars(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if found := sorted(path.glob("*.tar")):
        return found
    raise InputError(f"{path} holds no .tar: compressed tars cannot be read at any place, unpack .tar.gz to .tar")


def _shards(source: SourceOptions, name: str) -> Iterator[Record]:
    for path in _tars(source.path):
        try:
            for key, members in _samples(path):
                yield _sample(path, key, members, source.columns)
        except (tarfile.TarError, EOFError, OSError) as error:
            yield RowError(f"{path}: cannot be read on: {error}", "tar")


_Member = tuple[int, int, bytes]
"""Offset and size of a tar's member, and its bytes where they are text."""


def _samples(path: Path) -> Iterator[tuple[str, dict[str, _Member]]]:
    """(key, extension -> member) of a WebDataset tar; a key is a path up to the first dot of the file's name."""
    key, members = "", dict[str, _Member]()
    with tarfile.open(path, "r:") as tar:  # members that are not read are skipped by seeking
        for member in tar:
            if not member.isfile():
                continue
            folder, _, file = member.name.rpartition("/")
            stem, _, extension = file.partition(".")
            own = f"{folder}/{stem}" if folder else stem
            if own != key and members:
                yield key, members
                members = {}
            key = own
            stream = tar.extractfile(member) if extension in ("txt", "json") else None
            members[extension] = (member.offset_data, member.size, stream.read() if stream else b"")
    if members:
        yield key, members


def _sample(path: Path, key: str, members: Mapping[str, _Member], columns: Columns) -> Record:
    found = next((own for own in members if f".{own.rpartition('.')[2].lower()}" in VIDEO_SUFFIXES), None)
    if found is None:
        return RowError(f"{path.name}: sample {key} holds no video: {', '.join(members)}", "member")
    record: Any = {}
    try:
        if "json" in members:
            record = json.loads(members["json"][2])
        text = members["txt"][2].decode("utf-8-sig").strip() if "txt" in members else _caption(record, columns)
    except ValueError as error:
        return RowError(f"{path.name}: sample {key}: {error}", "row")
    meta = {column: plain(record.get(column)) for column in columns.meta} if isinstance(record, Mapping) else {}
    return Found(f"{path.stem}/{key}", _locator(path, f"{key}.{found}", *members[found][:2]), text, meta=meta)


def _locator(tar: Path, member: str, offset: int, size: int) -> dict[str, Any]:
    return {"tar": str(tar.absolute()), "offset": offset, "size": size, "name": f"{tar.name}/{member}"}


def _pe_video(source: SourceOptions, name: str) -> Iterator[Record]:
    """PE-Video by the rules of its reader (human captions, never the test split), its clips by their place."""
    for path in PEVideo(ReaderOptions(source.path, name)).files("train/*.tar", "*.tar"):
        places: dict[str, tuple[int, int]] = {}
        try:
            for key, members in _samples(path):
                if "mp4" in members:
                    places[f"{path.name}/{key.rpartition('/')[2]}.mp4"] = members["mp4"][:2]
        except (tarfile.TarError, EOFError, OSError):
            pass  # the reader says so in its place
        for _, row in PEVideo(ReaderOptions(path, name)).rows(media=False):
            if isinstance(row, Pair):
                clip = row.target.media[0].name
                yield Found(row.key, _locator(path, clip.rpartition("/")[2], *places[clip]), row.query.text)
            else:
                yield row


def _gve(source: SourceOptions, name: str) -> Iterator[Record]:
    """Text-to-video pairs of a shard folder of this project; only headers and json members are read."""
    sources = {key: own for key, own in open_sources(source.path).items() if own.record.task == "T2V"}
    if not sources:
        raise InputError(f"{source.path} holds no text-to-video source")
    for own in sources.values():
        if own.record.presample is not None:
            raise InputError(f"source {own.name} of {source.path} stores frames: synthesis needs original videos")
        for shard in own.record.shards:
            yield from _gve_shard(source.path / shard.file)


def _gve_shard(path: Path) -> Iterator[Record]:
    def found(members: dict[str, bytes], places: dict[str, tuple[int, int]]) -> Found:
        pair = decode_sample(members, pixels=False)
        clip = pair.target.media[0]
        locator = _locator(path, clip.name, *places[clip.name.partition(".")[2]])
        return Found(pair.key, locator | {"sha256": clip.sha256}, pair.query.text)

    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        key, members, places = "", dict[str, bytes](), dict[str, tuple[int, int]]()
        try:
            for member, _, begin, size in tar_members(data, path.name):
                own, _, part = member.partition(".")
                if own != key and members:
                    yield found(members, places)
                    members, places = {}, {}
                key = own
                members[part] = data[begin : begin + size] if part == "json" else b""
                places[part] = (begin, size)
            if members:
                yield found(members, places)
        except ShardError as error:
            yield RowError(str(error), "tar")


# --------------------------------------------------------------------------------------------------- published layouts


def _published(source: SourceOptions, name: str) -> Iterator[Record]:
    """WebVid and InternVid by their readers of gve.data."""
    kind = guess(source) if source.kind == "auto" else source.kind
    options = ReaderOptions(
        source.path, name, media=source.media, media_name=source.media_name, drop_list=source.drop_list
    )
    for _, row in open_reader(kind, options).rows():
        if not isinstance(row, Pair):
            yield row
            continue
        start = end = None
        if kind == "internvid" and source.media_name and "timestamp" not in source.media_name:
            # Whole videos instead of cut clips: the key ends with the span.
            start, end = (seconds(part) for part in row.key.rsplit("_", 2)[1:])
        clip = row.target.media[0].source
        assert isinstance(clip, Path)
        yield Found(row.key, {"file": str(clip.absolute())}, row.query.text, start, end)


_READERS: dict[str, Callable[[SourceOptions, str], Iterator[Record]]] = {
    "folder": _folder,
    "list": _list,
    "shards": _shards,
    "gve": _gve,
    "pe_video": _pe_video,
    "webvid": _published,
    "internvid": _published,
}
assert set(_READERS) == set(get_args(Kind)) - {"auto"}
