"""Exclusion lists: what must not be trained on, because a benchmark holds it too. `gve synth audit` writes them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from gve.data.readers.rows import Dropped, Reader, Row
from gve.items import InputError, Pair

CONTAMINATED = "contaminated"
"""Reason of what is left out because of a list."""


def read_exclusions(path: str | Path) -> frozenset[str]:
    """The ids of an exclusion list.

    Args:
        path: a JSON object a line with an `id`, and whatever else says why; or plain ids, one a line.

    Raises:
        InputError: it cannot be read, or a line is neither.
    """
    ids = set()
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"exclusion list {path} cannot be read: {error}") from error
    for number, line in enumerate(map(str.strip, lines), 1):
        if line.startswith("{"):
            try:
                line = json.loads(line)["id"]
            except (ValueError, KeyError) as error:
                raise InputError(f"exclusion list {path}, line {number}: no JSON object with an `id`") from error
        if not isinstance(line, str):
            raise InputError(f"exclusion list {path}, line {number}: the id {line!r} is no string")
        if line:
            ids.add(line)
    return frozenset(ids)


class Excluding:
    """The rows of a reader without those of an exclusion list, which are counted as dropped.

    Args:
        reader: of one or several sources.
        ids: a row's own id, or `<source>:<id>`, as the synthesis names weak pairs. A row without an id stays.
    """

    def __init__(self, reader: Reader, ids: frozenset[str]) -> None:
        self.name = reader.name
        self._reader, self._ids = reader, ids

    def survey(self) -> tuple[int, dict[str, set[str]]]:
        return self._reader.survey()

    def rows(self, *, media: bool = True) -> Iterator[tuple[int, Row]]:
        for number, row in self._reader.rows(media=media):
            listed = isinstance(row, Pair) and row.key and {row.key, f"{row.source}:{row.key}"} & self._ids
            yield number, Dropped(CONTAMINATED) if listed else row
