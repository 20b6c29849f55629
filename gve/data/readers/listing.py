"""A listing of the user's own: one pair a row, as jsonl or csv."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gve.data.curriculum import TASKS
from gve.data.readers.rows import Row, RowError
from gve.data.schema import ShardError
from gve.items import Image, Item, Pair, Part, Text, Video

_CSV_TEXTS = ("caption", "text", "sentence")


class Listing:
    """jsonl of {"query": {"text" | "image" | "video": ...}, "target": {...}, "negatives": [...], "id", "source",
    "task", "instruction"}, or csv with the columns `video` or `image` and `caption` (text to medium), or with columns
    like query_text, query_image and target_video. Paths are relative to the listing.

    Args:
        path: of the listing.
        source: name of the source where rows give none; the listing's name when empty.
        task: modality task where rows give none; derived from what the pair holds when empty.
        any_task: whether a pair may be of a task that the pyramid does not place.

    Raises:
        ShardError: the listing does not exist.
    """

    def __init__(self, path: str | Path, source: str = "", task: str = "", *, any_task: bool = False) -> None:
        self._path = Path(path)
        self.name = self._path.name
        self._task, self._any_task = task, any_task
        if not self._path.is_file():
            raise ShardError(f"listing {self._path} does not exist")
        self._source = source or re.sub(r"[^a-z0-9_]+", "_", self._path.stem.lower())[:40]

    def survey(self) -> tuple[int, dict[str, set[str]]]:
        total, tasks = 0, dict[str, set[str]]()
        for total, (_, row) in enumerate(self.rows(), 1):  # noqa: B007
            if isinstance(row, Pair):
                tasks.setdefault(row.source, set()).add(row.task)
        if total == 0:
            raise ShardError(f"{self._path} has no rows: give one JSON object a line, or a csv with a header")
        return total, tasks

    def rows(self, *, media: bool = True) -> Iterator[tuple[int, Row]]:
        for number, record in self._records():
            try:
                yield number, self._pair(record)
            except RowError as error:
                yield number, error

    def _records(self) -> Iterator[tuple[int, Any]]:
        try:
            with open(self._path, encoding="utf-8-sig", newline="") as file:
                if self._path.suffix.lower() == ".csv":
                    for number, columns in enumerate(csv.DictReader(file), 1):
                        yield number, _from_csv(columns)
                    return
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield number, _from_json(line)
        except (UnicodeDecodeError, csv.Error) as error:
            raise ShardError(f"listing {self._path} is not UTF-8 text: {error}") from error

    def _pair(self, row: Any) -> Pair:
        """The pair that a row describes, its media still unopened."""
        if isinstance(row, RowError):
            raise row
        known = {"id", "query", "target", "negatives", "source", "task", "instruction"}
        if not isinstance(row, Mapping) or not {"query", "target"} <= set(row) <= known:
            raise RowError(f"a row has `query`, `target` and maybe {sorted(known - {'query', 'target'})}", "row")
        query = self._item(row["query"], row.get("instruction", ""))
        target = self._item(row["target"])
        negatives = tuple(self._item(negative) for negative in row.get("negatives", ()))
        derived = f"{query.modality}2{target.modality}"
        task = row.get("task") or self._task or derived
        if task != derived or (task not in TASKS and not self._any_task):
            raise RowError(
                f"the pair is {derived}" + (f", not {task}" if task != derived else ", which no level has"), "task"
            )
        if any(negative.modality != target.modality for negative in negatives):
            raise RowError(f"a hard negative is not of the target's modality {target.modality}", "task")
        source, key = (str(row.get(name) or "") for name in ("source", "id"))
        return Pair(query, target, negatives, key=key, source=source or self._source, task=task)

    def _item(self, content: Any, instruction: str = "") -> Item:
        if not isinstance(content, Mapping):
            raise RowError(f"{content!r:.60} is no object with text, image or video", "row")
        entries = content["parts"] if set(content) == {"parts"} else [{k: content[k]} for k in content]
        parts: list[Part] = []
        for entry in entries if isinstance(entries, list) else [None]:
            kind, value = next(iter(entry.items())) if isinstance(entry, Mapping) and len(entry) == 1 else ("", None)
            if kind not in ("text", "image", "video") or not isinstance(value, str):
                raise RowError(f"{entry!r:.60} is no {{text | image | video: string}}", "row")
            if kind == "text":
                parts.append(Text(value))
            else:
                parts.append((Image if kind == "image" else Video)(self._path.parent / value, name=value))
        if not parts:
            raise RowError("an item holds nothing", "empty-item")
        if "parts" not in content:  # media stand before text, whatever order the keys have
            parts.sort(key=lambda part: ["Image", "Video", "Text"].index(type(part).__name__))
        if not isinstance(instruction, str):
            raise RowError(f"the instruction {instruction!r:.60} is no string", "row")
        return Item(tuple(parts), instruction)


def _from_json(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return RowError(f"no JSON: {error}", "row")


def _from_csv(columns: Mapping[str | None, Any]) -> Any:
    """A csv row in the form of a jsonl row."""
    filled = {name: value for name, value in columns.items() if name and value}
    row: dict[str, Any] = {name: filled[name] for name in ("id", "source", "task", "instruction") if name in filled}
    for role in ("query", "target"):
        content = {kind: filled[f"{role}_{kind}"] for kind in ("text", "image", "video") if f"{role}_{kind}" in filled}
        if content:
            row[role] = content
    caption = next((filled[name] for name in _CSV_TEXTS if name in filled), None)
    medium = next(({kind: filled[kind]} for kind in ("video", "image") if kind in filled), None)
    if not row.keys() & {"query", "target"} and caption and medium:
        row |= {"query": {"text": caption}, "target": medium}
    if not {"query", "target"} <= row.keys():
        return RowError(
            "a csv row needs video or image, and caption; or columns like query_text and target_video", "row"
        )
    return row
