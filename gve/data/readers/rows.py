"""What every reader yields, and how it reads annotation files: row by row, never a whole one in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Protocol

from gve.data.plan import key_of
from gve.data.schema import ShardError
from gve.items import InputError, Pair


class RowError(InputError):
    """One row cannot be used.

    Args:
        message: one line.
        reason: short slug that is counted.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Dropped:
    """A row that the rules of its source leave out. That is no fault; it is counted by reason.

    Args:
        reason: short slug.
    """

    reason: str


Row = Pair | RowError | Dropped
"""What a row of a data set is: a pair whose media are unopened, a row that cannot be used, or one that is left out."""


class Reader(Protocol):
    """Reads a local copy of a data set.

    Attributes:
        name: what was read, as provenance and messages say it.
    """

    name: str

    def survey(self) -> tuple[int, dict[str, set[str]]]:
        """(rows, or 0 where only reading them all would tell; source -> its tasks), without opening a media file."""

    def rows(self, *, media: bool = True) -> Iterator[tuple[int, Row]]:
        """(row number from 1, row), in the same order at every call.

        Args:
            media: False may leave the bytes of media out where a row brings them along.
        """


@dataclass(frozen=True)
class ReaderOptions:
    """Which local copy is read, and as what.

    Args:
        folder: of the data set, in the layout that the reader documents.
        source: name of the training source.
        task: modality task; empty takes the reader's own.
        media: folder of the clips or pictures; None takes the reader's own place.
        media_name: name of a clip below `media`, with the fields of its row in braces; empty takes the reader's own.
        drop_list: file with a clip key or video id a line that is left out (InternVid).
        negatives: hard negatives of a row that are kept, where the data set has some.
        seed: of the choices among several captions, positives or negatives.
    """

    folder: Path
    source: str
    task: str = ""
    media: Path | None = None
    media_name: str = ""
    drop_list: Path | None = None
    negatives: int = 0
    seed: int = 42


class FolderReader:
    """Common part of the readers of published data sets: one folder, one source, one task.

    Args:
        options: see there.

    Raises:
        ShardError: the folder is absent, or the data set does not serve the task.
    """

    tasks: ClassVar[tuple[str, ...]] = ()
    """Tasks that the data set serves; the first is the default."""

    def __init__(self, options: ReaderOptions) -> None:
        self.options = options
        self.name = options.folder.name
        self.task = options.task or self.tasks[0]
        if self.task not in self.tasks:
            raise ShardError(f"this data set serves {', '.join(self.tasks)}, not {self.task}")
        if not options.folder.exists():
            raise ShardError(f"{options.folder} does not exist: give the folder of the data set by --from")

    def survey(self) -> tuple[int, dict[str, set[str]]]:
        return 0, {self.options.source: {self.task}}

    def rows(self, *, media: bool = True) -> Iterator[tuple[int, Row]]:
        raise NotImplementedError

    def pick(self, count: int, key: str) -> int:
        """One of `count` choices of a row, by the seed and the row's key."""
        return key_of(self.options.seed, self.options.source, key) % count

    def files(self, *patterns: str) -> list[Path]:
        """The annotation files: the folder itself if it is a file, else those of the first pattern that finds some.

        Raises:
            ShardError: none does.
        """
        folder = self.options.folder
        if folder.is_file():
            return [folder]
        for pattern in patterns:
            if found := sorted(path for path in folder.glob(pattern) if path.is_file()):
                return found
        raise ShardError(f"{folder} holds no {' or '.join(patterns)}: give the folder of the data set by --from")


class Limited:
    """At most `limit` usable rows of a reader, drawn alike from all of them by the seed; their order stays.

    Two readings of the annotations and 8 bytes a row. Rows that later turn out to be undecodable are not replaced.

    Args:
        reader: of one source.
        limit: most rows.
        seed: of the draw.
    """

    def __init__(self, reader: Reader, limit: int, seed: int) -> None:
        if limit < 1:
            raise ShardError(f"a limit of {limit} rows: use 1 or more")
        self.name = reader.name
        self._reader, self._limit, self._seed = reader, limit, seed
        self._largest: int | None = None

    def survey(self) -> tuple[int, dict[str, set[str]]]:
        return self._reader.survey()

    def rows(self, *, media: bool = True) -> Iterator[tuple[int, Row]]:
        if self._largest is None:
            marks = sorted(self._mark(row) for _, row in self._reader.rows(media=False) if isinstance(row, Pair))
            self._largest = marks[: self._limit][-1] if marks else 0
        for number, row in self._reader.rows(media=media):
            over = isinstance(row, Pair) and self._mark(row) > self._largest
            yield number, Dropped("over-limit") if over else row

    def _mark(self, pair: Pair) -> int:
        return key_of(self._seed, "limit", pair.source, pair.key)


def mark(text: str) -> int:
    """64-bit hash of a text. Among 10 million texts two differing ones are equal with a chance of 3 in a million."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def media_path(root: Path, name: str) -> Path:
    """The file of this name below a folder.

    Raises:
        RowError: it is missing, or the name leads out of the folder.
    """
    path = root / name
    if ".." in Path(name).parts or Path(name).is_absolute():
        raise RowError(f"{name}: leads out of {root}", "outside")
    if not path.is_file():
        raise RowError(f"{path}: no such file", "missing")
    return path


def json_rows(path: Path) -> Iterator[Any]:
    """The values of a jsonl file or of one JSON array, one at a time; a RowError in place of a damaged line.

    Raises:
        ShardError: the file is no UTF-8 text, or its array is damaged.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            start = file.read(1)
            while start.isspace():
                start = file.read(1)
            if start == "[":
                yield from _array(iter(lambda: file.read(1 << 16), ""), path)
                return
            file.seek(0)
            for line in file:
                if line.strip():
                    yield _parsed(line)
    except UnicodeDecodeError as error:
        raise ShardError(f"{path} is not UTF-8 text: {error}") from error


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        return RowError(f"no JSON: {error}", "row")


def _array(chunks: Iterator[str], path: Path) -> Iterator[Any]:
    """Values of an array whose opening bracket is read already."""
    decoder, text = json.JSONDecoder(), ""
    for chunk in chunks:
        text += chunk
        while text := text.lstrip(" \t\r\n,"):
            if text[0] == "]":
                return
            try:
                value, end = decoder.raw_decode(text)
            except json.JSONDecodeError:
                break  # it goes on in the next chunk
            if end == len(text):
                break  # a number may go on
            yield value
            text = text[end:]
    raise ShardError(f"{path}: its JSON array is cut off or damaged near {text[:40]!r}")


def fields(record: Any, *names: str) -> tuple[Any, ...]:
    """Values of a JSON object or csv row by name.

    Raises:
        RowError: it is no object, or lacks one.
    """
    if isinstance(record, RowError):
        raise record
    if not isinstance(record, Mapping):
        raise RowError(f"{record!r:.60} is no JSON object", "row")
    absent = [name for name in names if record.get(name) is None]
    if absent:
        raise RowError(f"a row lacks {', '.join(absent)}", "row")
    return tuple(record[name] for name in names)


class Lookup:
    """Lines of jsonl files by their id: one scan keeps the places of the wanted ones, a line is read when asked for.

    Args:
        paths: jsonl files; where several have an id, the first one holds.
        field: name of the id.
        wanted: ids; 100 bytes of memory each.
    """

    def __init__(self, paths: Iterable[Path], field: str, wanted: set[str]) -> None:
        self._places: dict[str, tuple[Path, int]] = {}
        self._open: dict[Path, BinaryIO] = {}
        self._stack = ExitStack()
        for path in paths:
            if len(self._places) == len(wanted):
                break
            with open(path, "rb") as file:
                offset = 0
                for line in file:
                    record = _parsed(line.decode("utf-8", "replace")) if line.strip() else None
                    key = str(record.get(field)) if isinstance(record, Mapping) else None
                    if key in wanted:
                        self._places.setdefault(key, (path, offset))
                    offset += len(line)

    def __getitem__(self, key: str) -> dict[str, Any]:
        """The line of an id.

        Raises:
            RowError: no file has it.
        """
        if key not in self._places:
            raise RowError(f"{key}: no file of candidates has it", "no-candidate")
        path, offset = self._places[key]
        if path not in self._open:
            self._open[path] = self._stack.enter_context(open(path, "rb"))  # noqa: SIM115
        self._open[path].seek(offset)
        return json.loads(self._open[path].readline())

    def close(self) -> None:
        self._stack.close()
        self._open.clear()
