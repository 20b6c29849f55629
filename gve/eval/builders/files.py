"""The user's own files: annotation files of a source, rows of any table format, and clips found by name."""

from __future__ import annotations

import csv
import fnmatch
import hashlib
import io
import json
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from gve.items import InputError

Row = dict[str, Any]

# Files beside the clips that are no clips. What a video is, its content decides later; this keeps names apart.
_IMAGES = (".jpg", ".jpeg", ".png", ".webp")
_NO_MEDIA = frozenset({".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet", ".md", ".tar", ".gz", ".zip", ".npz"})


def walk(folder: Path) -> list[str]:
    """Paths of all files below a folder, relative, sorted; links to folders are followed once each."""
    found: list[str] = []
    seen: set[str] = set()
    for here, folders, names in os.walk(folder, followlinks=True):
        true = os.path.realpath(here)
        if true in seen:
            folders.clear()
            continue
        seen.add(true)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        base = Path(here).relative_to(folder).as_posix()
        found += [name if base == "." else f"{base}/{name}" for name in names if not name.startswith(".")]
    return sorted(found)


class SourceFiles:
    """Annotation files of a source. Remembers what was read, so that set.json can name it.

    Args:
        where: a folder that is searched with all that lies below it, or one file.

    Raises:
        InputError: there is nothing.
    """

    def __init__(self, where: str | Path) -> None:
        self.where = Path(where)
        if not self.where.exists():
            raise InputError(f"--from {where}: no such file or folder")
        self.folder = self.where if self.where.is_dir() else self.where.parent
        self.used: dict[str, dict[str, Any]] = {}

    @cached_property
    def names(self) -> list[str]:
        """Relative paths of all files."""
        return walk(self.folder) if self.where.is_dir() else [self.where.name]

    def find(self, *patterns: str) -> list[Path]:
        """The files of the first pattern that matches: one file, or all parts of a table (`x-00000-of-00002`).

        Args:
            patterns: of file names, in the order of preference; case does not count. One with a "/" is matched to the
                end of the path.

        Raises:
            InputError: several different files match alike.
        """
        for pattern in patterns:
            deep = f"*/{pattern}" if "/" in pattern else None
            found = [
                name
                for name in self.names
                if fnmatch.fnmatch(
                    f"/{name}".lower() if deep else name.rpartition("/")[2].lower(), (deep or pattern).lower()
                )
            ]
            parts = [name for name in found if re.search(r"-\d+-of-\d+\.", name)]
            if parts and len(parts) == len(found):
                return [self.folder / name for name in parts]
            if len({(self.folder / name).read_bytes() for name in found}) > 1:
                raise InputError(f"{self.folder} has {' and '.join(found[:3])}: pass the right one as --from")
            if found:
                return [self.folder / found[0]]
        return []

    def need(self, *patterns: str, obtain: str) -> list[Path]:
        """`find`, or an InputError that says what to get."""
        if found := self.find(*patterns):
            return found
        # One file that the user names is taken for what is asked, whatever it is called.
        if not self.where.is_dir():
            return [self.where]
        raise InputError(f"{self.folder} holds no {' or '.join(patterns)}; get {obtain}")

    def read(self, path: Path) -> bytes:
        """A file's bytes; its hash goes into the record."""
        content = path.read_bytes()
        name = path.relative_to(self.folder).as_posix()
        self.used[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        return content

    def document(self, path: Path) -> Any:
        """A JSON file."""
        try:
            return json.loads(self.read(path).decode("utf-8-sig"))
        except ValueError as error:
            raise InputError(f"{path} is not JSON: {error}") from None

    def rows(self, paths: Sequence[Path]) -> list[Row]:
        """Rows of json (an array), jsonl, csv (any of `,;` and tab) or parquet files, one after the other.

        Raises:
            InputError: a file is none of these.
        """
        return [row for path in paths for row in self._rows(path)]

    def _rows(self, path: Path) -> list[Row]:
        content = self.read(path)
        if content.startswith(b"PAR1"):
            return _parquet_rows(content, path)
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is neither UTF-8 text nor parquet: {error.reason}") from None
        if path.suffix.lower() in (".csv", ".tsv"):
            return _csv_rows(text, path)
        return _json_rows(text, path)


def _parquet_rows(content: bytes, path: Path) -> list[Row]:
    """All columns but raw bytes: some data sets keep whole videos in a column."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{path} needs pyarrow: pip install pyarrow") from None
    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(content))
        plain = [field.name for field in file.schema_arrow if "binary" not in str(field.type)]
        return file.read(columns=plain).to_pylist()
    except pyarrow.ArrowException as error:
        raise InputError(f"{path} is not a parquet file: {error}") from None


def _csv_rows(text: str, path: Path) -> list[Row]:
    header = text.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    rows = []
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    for row in reader:
        if None in row or None in row.values():
            raise InputError(f"{path}:{reader.line_num} has not as many fields as its header ({header.strip()!r})")
        rows.append(row)
    return rows


def _json_rows(text: str, path: Path) -> list[Row]:
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except ValueError as error:
            raise InputError(f"{path} is not JSON: {error}") from None
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except ValueError as error:
                    raise InputError(f"{path}:{number} is not JSON: {error}") from None
    if not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path} holds something else than objects")
    return rows


def pick(row: Row, *names: str) -> Any:
    """The first field of these names that has a value.

    Raises:
        InputError: there is none.
    """
    for name in names:
        if row.get(name) not in (None, ""):
            return row[name]
    raise InputError(f"a row has no {' or '.join(names)}; its fields are {', '.join(map(str, row))[:200]}")


def texts(value: Any) -> list[str]:
    """A caption field: nothing, one string, or several."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return [text for one in values if (text := str(one or "").strip())]


def stem(name: str) -> str:
    """A path without its last suffix. The names hold dots ("IWv0EhEGmNI.16.6.mp4"), and some end in a bare one."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + (base.rpartition(".")[0] or base)


def _is_image(name: str) -> bool:
    return name.lower().endswith(_IMAGES)


class MediaFolder:
    """Clips on the user's disk, found by the names that annotations give them.

    The folder is linked into the root as `media/<link>`, never copied; listings name clips by that path, so that sets
    which share a source share files, and listings are equal on all machines.

    Args:
        folder: where the clips lie, at any depth.
        link: name below `<root>/media`.
    """

    def __init__(self, folder: Path, link: str) -> None:
        self.folder, self.link = folder, link
        self.found: set[str] = set()
        self.absent: set[str] = set()

    @cached_property
    def names(self) -> list[str]:
        """Relative paths of the files that may be media."""
        return [name for name in walk(self.folder) if PurePosixPath(name).suffix.lower() not in _NO_MEDIA]

    @cached_property
    def _places(self) -> dict[str, list[str]]:
        """Last part of the path, whole and without suffix -> paths."""
        places: dict[str, list[str]] = defaultdict(list)
        for name in self.names:
            base = name.rpartition("/")[2]
            for key in {base, stem(base)}:
                places[key].append(name)
        return places

    def find(self, name: str, *, unique: bool = True) -> str | None:
        """The file of a name, relative to the folder.

        Args:
            name: as an annotation writes it. Its suffix need not be the file's.
            unique: a file is known by the last part of its path; without it the folder's name must agree too, or the
                file be called by its path with "_" for "/", as MMEB-V2 does.

        Raises:
            InputError: several files fit equally well.
        """
        name = os.path.normpath(name).lstrip("/")
        folder, _, base = name.rpartition("/")
        flat = name.replace("/", "_")
        for key in (base, stem(base), flat, stem(flat)):
            fitting = [path for path in self._places.get(key, ()) if _is_image(path) == _is_image(name)]
            if not unique and key in (base, stem(base)) and key not in (flat, stem(flat)):
                own = folder.rpartition("/")[2]
                fitting = [path for path in fitting if path.split("/")[-2:-1] == [own]]
            if fitting:
                return self._nearest(name, fitting)
        return None

    def _nearest(self, name: str, fitting: Sequence[str]) -> str:
        """The one that shares the longest end of its path with the name; an mp4 before others."""
        wanted = [*reversed(stem(name).split("/"))]

        def shared(path: str) -> tuple[int, bool, bool]:
            parts = [*reversed(stem(path).split("/"))]
            same = next(
                (i for i, pair in enumerate(zip(wanted, parts, strict=False)) if pair[0] != pair[1]), len(wanted)
            )
            return same, path.endswith(name.rpartition("/")[2]), path.lower().endswith(".mp4")

        best = max(map(shared, fitting))
        nearest = [path for path in fitting if shared(path) == best]
        if len(nearest) > 1:
            raise InputError(
                f"{name}: {nearest[0]} and {nearest[1]} below {self.folder} both fit; pass a narrower --media"
            )
        return nearest[0]

    def listed(self, name: str, *, unique: bool = True) -> str:
        """The path that a listing gives to a clip; by its own name where it is not on the disk."""
        found = self.find(name, unique=unique)
        (self.absent if found is None else self.found).add(name)
        return f"../media/{self.link}/{found or os.path.normpath(name)}"
