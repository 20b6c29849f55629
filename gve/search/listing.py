"""What is to be embedded: media files, folders of them, and lists of texts, media and mixes of both."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gve.items import Image, InputError, Item, Part, Text, Video
from gve.search.files import look_into, printable, walk
from gve.video import MediaError, is_picture

LISTS = (".jsonl", ".parquet", ".txt")
_KEYS = ("id", "text", "image", "video", "start_s", "end_s", "instruction")
_NO_MEDIA = frozenset({"not-a-video", "no-video-stream", "empty"})


@dataclass
class Listed:
    """Items in the order of the inputs.

    Args:
        items: each with an id that no other has.
        failures: id -> why a row is no item.
        skipped: files of folders that are neither pictures nor videos.
    """

    items: list[Item] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)


def list_items(inputs: Sequence[str | Path], instruction: str = "") -> Listed:
    """The items that inputs name.

    A `.jsonl` or `.parquet` file has an item a row: `text`, `image`, `video` (at least one; media stand before text),
    and maybe `id`, `instruction`, and `start_s` with `end_s` for a span of the video. Media paths are relative to the
    list. A `.txt` file has a text a line. Any other file is a picture or a video, by its content; of folders, files
    that are neither are skipped. An item without an id is called by its list and row, or by its path.

    Args:
        instruction: of items that name none.

    Raises:
        InputError: an input does not exist, a list cannot be read, or an id comes twice.
    """
    listed = Listed()
    seen: set[str] = set()

    def add(name: str, make: Iterable[Part] | str, words: str = "") -> None:
        if name in seen:
            raise InputError(f"id {name!r} comes twice: vectors could not be told apart")
        seen.add(name)
        if isinstance(make, str):
            listed.failures[name] = make
        else:
            listed.items.append(Item(tuple(make), words or instruction, name))

    for given in inputs:
        path = Path(given)
        if path.is_file() and path.suffix.lower() in LISTS:
            for number, row in enumerate(_rows(path), 1):
                name, parts, words = _item(row, path, number)
                add(name, parts, words)
            continue
        within = path.is_dir()
        walked = walk([path])
        for unread, reason in walked.unreadable.items():
            add(_called(unread, path), reason)
        for found in walked.found:
            name = _called(found.path, path)
            try:
                add(name, [_medium(found.path)])
            except MediaError as error:
                if within and error.reason in _NO_MEDIA:
                    listed.skipped.append(name)
                else:
                    add(name, str(error))
    return listed


def _called(path: bytes, given: Path) -> str:
    """A file's id: the input as it was written, and what follows below it."""
    inside = os.path.relpath(path, os.path.abspath(os.fsencode(given)))
    return printable(os.fsencode(given) if inside == b"." else os.path.join(os.fsencode(given), inside))


def _medium(path: bytes) -> Image | Video:
    """A picture or a video, by content.

    Raises:
        MediaError: neither.
    """
    source, name = os.fsdecode(path), printable(path)
    if is_picture(source):
        return Image(source, name=name)
    look_into(path)
    return Video(source, name=name)


def _rows(path: Path) -> Iterator[Any]:
    """Rows of a list: mappings, texts, or a reason in an InputError."""
    try:
        if path.suffix.lower() == ".parquet":
            yield from _parquet_rows(path)
            return
        with open(path, encoding="utf-8-sig") as file:
            for line in file:
                if path.suffix.lower() == ".txt":
                    yield {"text": line.rstrip("\n")} if line.strip() else InputError("the line is empty")
                elif line.strip():
                    try:
                        yield json.loads(line)
                    except ValueError as error:
                        yield InputError(f"no JSON: {error}")
    except UnicodeDecodeError as error:
        raise InputError(f"list {printable(os.fsencode(path))} is not UTF-8 text: {error}") from None


def _parquet_rows(path: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        columns = [name for name in file.schema_arrow.names if name in _KEYS]
        if not set(columns) & {"text", "image", "video"}:
            raise InputError(f"list {path} has no column text, image or video: {', '.join(file.schema_arrow.names)}")
        for batch in file.iter_batches(columns=columns):
            yield from ({key: value for key, value in row.items() if value is not None} for row in batch.to_pylist())
    except pa.ArrowException as error:
        raise InputError(f"list {path} is no parquet file: {error}") from None


def _item(row: Any, path: Path, number: int) -> tuple[str, list[Part] | str, str]:
    """(Id, parts or why there are none, instruction) of a row."""
    name = f"{printable(os.fsencode(path))}:{number}"
    if isinstance(row, InputError):
        return name, str(row), ""
    if not isinstance(row, Mapping):
        return name, f"{row!r:.60} is no object with text, image or video", ""
    if "id" in row:
        name = str(row["id"])
    strings = {key: row[key] for key in ("text", "image", "video", "instruction") if row.get(key) is not None}
    if unknown := sorted(set(row) - set(_KEYS)):
        return name, f"key {unknown[0]!r} is unknown; known: {', '.join(_KEYS)}", ""
    if wrong := [key for key, value in strings.items() if not isinstance(value, (str, bytes))]:
        return name, f"{wrong[0]} is no string", ""
    parts: list[Part] = []
    try:
        for key, kind in (("image", Image), ("video", Video)):
            if not strings.get(key):
                continue
            content = strings[key]
            source = content if isinstance(content, bytes) else path.parent / content
            called = name if isinstance(content, bytes) else content
            span = (float(row["start_s"]), float(row["end_s"])) if key == "video" and "start_s" in row else None
            parts.append(Video(source, name=called, span_s=span) if kind is Video else Image(source, name=called))
    except (InputError, KeyError, TypeError, ValueError) as error:
        return name, f"start_s and end_s are no span: {error}", ""
    if strings.get("text"):
        parts.append(Text(str(strings["text"])))
    if not parts:
        return name, "the row has neither text nor image nor video", ""
    return name, parts, str(strings.get("instruction", ""))
