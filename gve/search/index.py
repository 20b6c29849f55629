"""The index: vectors of windows of video files, kept by LanceDB, and the search over them.

An index is a folder, or an address of an object store such as `s3://bucket/index`, with two LanceDB tables. `clips` has
a row a window; its schema carries the record of the index, so one commit makes an index whole. `rejected` remembers
files that are no videos, so they are not opened again.

Search is exact by default: every vector is compared in fp32. Vectors have unit length; a score is a cosine.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

import gve
from gve.items import InputError
from gve.search.files import VideoFile, file_id_of
from gve.search.windows import Windows

FORMAT = 1
_KEY = b"gve"  # of the record in the schema's metadata
_FILE_COLUMNS = {
    "size_bytes": pa.int64(),
    "mtime_ns": pa.int64(),
    "sha256": pa.string(),
    "duration_s": pa.float64(),
    "width": pa.int32(),
    "height": pa.int32(),
    "fps": pa.float64(),
    "codec": pa.string(),
}
FILTERS = ("file", "start_s", "end_s", "size_bytes", "duration_s", "width", "height", "fps", "codec", "sha256")
"""Columns that a filter may name; `file` is the printable path."""


def _clips_schema(dim: int) -> pa.Schema:
    """Columns of `clips`: a window and its file."""
    return pa.schema(
        [
            ("file_id", pa.string()),
            ("window", pa.int32()),
            ("start_s", pa.float64()),
            ("end_s", pa.float64()),
            ("vector", pa.list_(pa.float32(), dim)),
            ("path", pa.binary()),
            ("file", pa.string()),
            *_FILE_COLUMNS.items(),
        ]
    )


_REJECTED = pa.schema(
    [
        ("file_id", pa.string()),
        ("path", pa.binary()),
        ("size_bytes", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("reason", pa.string()),
    ]
)
_KEPT_VERSIONS = datetime.timedelta(minutes=10)  # readers that are at work go on with the version they opened
_OVERFETCH = 4  # windows asked for each hit at first: a window of half its length as stride has two neighbours


@dataclass(frozen=True)
class IndexRecord:
    """What an index was made by; its vectors may only be compared with those of the same model and inputs.

    Args:
        model: name as the user gave it; a local path is absolute.
        fingerprint: of the encoder: weights and all that decides their inputs.
        dim: length of a vector.
        adapter, base: as `load_encoder` takes them.
        setting: frames of a clip, tokens of a frame, tokens of an input.
        inputs: everything but the weights that decides the vectors.
        windows: how files were cut.
    """

    model: str
    fingerprint: str
    dim: int
    adapter: str = "auto"
    base: str = ""
    setting: Mapping[str, int] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)
    windows: Windows = field(default_factory=Windows)

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "version": gve.__version__, **asdict(self)})

    @classmethod
    def from_json(cls, text: str | bytes) -> IndexRecord:
        """The record of `to_json`.

        Raises:
            InputError: it is of another format.
        """
        values = json.loads(text)
        if values.pop("format") != FORMAT:
            raise InputError(f"the index was written by gve {values.get('version')} in another format: build it again")
        known = {own.name for own in fields(cls)}
        return cls(**{name: values[name] for name in known - {"windows"}}, windows=Windows(**values["windows"]))


@dataclass(frozen=True, eq=False)
class Clips:
    """A file with its windows, ready to be added.

    Args:
        file: the file.
        spans: (start, end) of N windows in seconds, rising.
        vectors: [N, D] float32, unit rows.
    """

    file: VideoFile
    spans: Sequence[tuple[float, float]]
    vectors: np.ndarray


@dataclass(frozen=True)
class Rejected:
    """A file that is no video that can be used.

    Args:
        path: absolute.
        size_bytes, mtime_ns: as in VideoFile.
        reason: one line.
    """

    path: bytes
    size_bytes: int
    mtime_ns: int
    reason: str


@dataclass(frozen=True)
class Hit:
    """A moment that was found.

    Args:
        file: the file it is in.
        start_s, end_s: the moment, in seconds after the file's first frame.
        score: cosine of query and moment.
    """

    file: VideoFile
    start_s: float
    end_s: float
    score: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `path` is what `os.fsencode` turns back into the bytes of the name."""
        return {
            "path": os.fsdecode(self.file.path),
            "name": self.file.name,
            "start_s": self.start_s,
            "end_s": self.end_s,
            "score": self.score,
            "duration_s": self.file.duration_s,
            "width": self.file.width,
            "height": self.file.height,
        }


class Index:
    """Vectors of windows of video files. Open one with `Index.open`, make one with `Index.create`.

    Every change is one commit of LanceDB: a reader, or the next run after a kill, meets a file with all of its windows
    or without any. One process may write at a time; any number may search.

    Args:
        uri: folder or address.
        record: what it was made by.
        clips, rejected: LanceDB's tables.
    """

    def __init__(self, uri: str, record: IndexRecord, clips: Any, rejected: Any) -> None:
        self.uri, self.record = uri, record
        self._clips, self._rejected = clips, rejected

    @classmethod
    def create(cls, uri: str | Path, record: IndexRecord) -> Index:
        """A new, empty index.

        Raises:
            InputError: there is one already, or the folder holds other things.
        """
        uri = str(uri)
        if cls.exists(uri):
            raise InputError(f"index {uri} exists already")
        if local(uri) and os.path.exists(uri):
            strangers = sorted(set(os.listdir(uri)) - {"clips.lance", "rejected.lance", "draft", "lock"})
            if strangers:
                raise InputError(f"{uri} is no index and holds {strangers[0]!r}: give an empty or a new folder")
        database = _connect(uri)
        schema = _clips_schema(record.dim).with_metadata({_KEY: record.to_json().encode()})
        rejected = database.create_table("rejected", schema=_REJECTED, mode="overwrite")
        return cls(uri, record, database.create_table("clips", schema=schema, mode="overwrite"), rejected)

    @classmethod
    def exists(cls, uri: str | Path) -> bool:
        """Whether there is an index: a folder that a kill left while it was created is none."""
        try:
            cls.open(uri)
        except InputError:
            return False
        return True

    @classmethod
    def open(cls, uri: str | Path) -> Index:
        """The index at an address.

        Raises:
            InputError: there is none, or it is of another format.
        """
        uri = str(uri)
        if local(uri) and not os.path.isdir(uri):
            raise InputError(f"there is no index at {uri}: make one with gve index DIR --model M --out {uri}")
        try:
            database = _connect(uri)
            clips, rejected = database.open_table("clips"), database.open_table("rejected")
        except (ValueError, RuntimeError, OSError) as error:
            raise InputError(f"there is no index at {uri} ({_first_line(error)})") from None
        metadata = clips.schema.metadata or {}
        if _KEY not in metadata:
            raise InputError(f"{uri} is a database of LanceDB, but no index of gve")
        return cls(uri, IndexRecord.from_json(metadata[_KEY]), clips, rejected)

    def __len__(self) -> int:
        """Number of windows."""
        return self._clips.count_rows()

    def files(self) -> dict[str, VideoFile]:
        """Every indexed file by its id."""
        columns = ["path", *_FILE_COLUMNS]
        table = self._clips.search().where("window = 0").select(columns).to_arrow()
        return {file.file_id: file for file in _video_files(table)}

    def file(self, file_id: str) -> VideoFile | None:
        """The indexed file of an id; None where there is none, or no id has this form."""
        if not re.fullmatch("[0-9a-f]{32}", file_id):
            return None
        query = self._clips.search().where(_any_of("file_id", [file_id])).limit(1)
        return next(iter(_video_files(query.select(["path", *_FILE_COLUMNS]).to_arrow())), None)

    def rejected(self) -> dict[str, Rejected]:
        """Every file that was looked at and is none, by its id."""
        rows = self._rejected.to_arrow().to_pylist()
        return {row.pop("file_id"): Rejected(**row) for row in rows}

    def add(self, clips: Sequence[Clips]) -> None:
        """Adds files, or puts them in the place of what was known of their paths; all of them or, when killed, none.

        Raises:
            InputError: a vector has the wrong length or is not finite.
        """
        clips = [own for own in clips if len(own.spans)]
        if not clips:
            return
        for own in clips:
            if own.vectors.shape != (len(own.spans), self.record.dim) or not np.isfinite(own.vectors).all():
                raise InputError(
                    f"{own.file.name}: vectors {own.vectors.shape} do not fit the index, or are not finite"
                )
        rows = self._rows(clips)
        # Ids are hex digits: nothing of a name ever reaches the language of conditions.
        replaced = _any_of("file_id", [own.file.file_id for own in clips])
        (
            self._clips.merge_insert(["file_id", "window"])
            .when_matched_update_all()
            .when_not_matched_insert_all()
            .when_not_matched_by_source_delete(replaced)
            .execute(rows)
        )
        self._forget_rejected(replaced)

    def touch(self, file_id: str, size_bytes: int, mtime_ns: int) -> None:
        """Notes that a file was written again with the same content."""
        self._clips.update(where=_any_of("file_id", [file_id]), values={"size_bytes": size_bytes, "mtime_ns": mtime_ns})

    def reject(self, files: Sequence[Rejected]) -> None:
        """Remembers files that are no videos, and forgets their windows if they had been."""
        if not files:
            return
        ids = [file_id_of(file.path) for file in files]
        self._clips.delete(_any_of("file_id", ids))
        self._forget_rejected(_any_of("file_id", ids))
        rows = [{"file_id": own, **asdict(file)} for own, file in zip(ids, files, strict=True)]
        self._rejected.add(pa.Table.from_pylist(rows, schema=_REJECTED))

    def delete(self, file_ids: Iterable[str]) -> None:
        """Forgets files."""
        ids = list(file_ids)
        for start in range(0, len(ids), 1000):
            some = _any_of("file_id", ids[start : start + 1000])
            self._clips.delete(some)
            self._forget_rejected(some)

    def _forget_rejected(self, some: str) -> None:
        if self._rejected.count_rows():  # a commit that changes nothing costs as much as one that does
            self._rejected.delete(some)

    def known_content(self, hashes: Sequence[str]) -> list[tuple[str, tuple[float, float], np.ndarray]]:
        """(sha256, span, vector) of the windows of files with this content, whatever their paths."""
        if not hashes:
            return []
        table = self._clips.search().where(_any_of("sha256", hashes))
        table = table.select(["sha256", "start_s", "end_s", "vector"]).to_arrow()
        vectors = _matrix(table["vector"], self.record.dim)
        spans = zip(table["start_s"].to_pylist(), table["end_s"].to_pylist(), strict=True)
        return list(zip(table["sha256"].to_pylist(), spans, vectors, strict=True))

    def compact(self) -> None:
        """Joins the small files that additions leave, brings new rows under the IVF index, drops old versions."""
        for table in (self._clips, self._rejected):
            table.optimize(cleanup_older_than=_KEPT_VERSIONS)

    @property
    def approximate(self) -> bool:
        """Whether there is an IVF index."""
        return any("vector" in own.columns for own in self._clips.list_indices())

    def build_ivf(self, partitions: int | None = None) -> None:
        """Makes an inverted file over the vectors as they are, uncompressed, for searches that may miss something.

        Args:
            partitions: number of cells; about the square root of the number of windows when None.

        Raises:
            InputError: there are fewer windows than cells.
        """
        count = len(self)
        cells = partitions or max(1, round(count**0.5))
        if count < cells or not count:
            raise InputError(f"{count} windows cannot fill {cells} partitions: search exactly, or index more first")
        from lancedb.index import IvfFlat

        self._clips.create_index("vector", config=IvfFlat(distance_type="dot", num_partitions=cells), replace=True)

    def search(
        self, vector: np.ndarray, k: int = 10, *, where: str = "", nprobes: int | None = None, merge: bool = True
    ) -> list[Hit]:
        """The k nearest moments, best first.

        Args:
            vector: [D] float32, unit length, of the index' own model.
            k: how many; fewer where the index or the filter has no more.
            where: condition in SQL over FILTERS, for example "duration_s > 60 AND file LIKE '%/holiday/%'".
            nprobes: None compares every vector; a number looks into that many partitions of the IVF index only.
            merge: of windows of a file that overlap, only the best is a hit. The first k hits do not depend on k.

        Raises:
            InputError: the vector does not fit, the filter cannot be read, or there is no IVF index.
        """
        vector = np.ascontiguousarray(vector, np.float32)
        if vector.shape != (self.record.dim,) or not np.isfinite(vector).all():
            raise InputError(f"a query of shape {vector.shape} does not fit an index of {self.record.dim} numbers")
        if k < 1:
            raise InputError(f"k={k} must be at least 1")
        if nprobes is not None and not self.approximate:
            raise InputError(f"index {self.uri} has no IVF index: make it with gve index --ivf, or search exactly")
        limit = k * _OVERFETCH if merge else k
        while True:
            table = self._nearest(vector, limit, where, nprobes)
            hits = _hits(table, merge)
            if len(hits) >= k or len(table) < limit:
                return hits[:k]
            limit *= _OVERFETCH

    def _nearest(self, vector: np.ndarray, limit: int, where: str, nprobes: int | None) -> pa.Table:
        query = self._clips.search(vector, vector_column_name="vector").distance_type("dot")
        query = query.bypass_vector_index() if nprobes is None else query.nprobes(nprobes)
        if where:
            query = query.where(where, prefilter=True)
        columns = ["start_s", "end_s", "path", *_FILE_COLUMNS, "_distance"]
        try:
            return query.select(columns).limit(limit).to_arrow()
        except (ValueError, RuntimeError) as error:
            if not where:
                raise
            raise InputError(
                f"filter {where!r} cannot be used ({_first_line(error)}); columns: {', '.join(FILTERS)}"
            ) from None

    def _rows(self, clips: Sequence[Clips]) -> pa.Table:
        """One table of all windows, in one piece: LanceDB merges each piece by itself."""
        counts = [len(own.spans) for own in clips]

        def repeated(values: Iterable[Any]) -> list[Any]:
            return [value for value, count in zip(values, counts, strict=True) for _ in range(count)]

        spans = [span for own in clips for span in own.spans]
        values = np.concatenate([np.asarray(own.vectors, np.float32) for own in clips]).ravel()
        columns: dict[str, Any] = {
            "file_id": repeated(own.file.file_id for own in clips),
            "window": [number for count in counts for number in range(count)],
            "start_s": [start for start, _ in spans],
            "end_s": [end for _, end in spans],
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(values), self.record.dim),
            "path": repeated(own.file.path for own in clips),
            "file": repeated(own.file.name for own in clips),
            **{name: repeated(getattr(own.file, name) for own in clips) for name in _FILE_COLUMNS},
        }
        return pa.table(columns, schema=_clips_schema(self.record.dim))


def local(uri: str) -> bool:
    """Whether an index is a folder of this machine, and no address of an object store."""
    return "://" not in uri


def _connect(uri: str) -> Any:
    os.environ.setdefault("LANCEDB_LOG", "error")  # it warns of every table that it makes
    # Decode workers are forked beside LanceDB's threads. They never call it, and no call is under way at a fork.
    warnings.filterwarnings("ignore", message="lancedb fork support", category=RuntimeWarning)
    try:
        import lancedb
    except ImportError:
        raise InputError("the index needs LanceDB: pip install gve") from None
    return lancedb.connect(uri)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]


def _any_of(column: str, values: Sequence[str]) -> str:
    """A condition on a column of hex digits."""
    if not all(value.isalnum() for value in values):
        raise ValueError(f"{column} must be hex digits")
    return f"{column} IN ({', '.join(repr(value) for value in values)})"


def _matrix(column: pa.ChunkedArray, dim: int) -> np.ndarray:
    """[N, dim] float32."""
    flat = [np.asarray(chunk.flatten(), np.float32) for chunk in column.chunks]
    return np.concatenate([np.empty(0, np.float32), *flat]).reshape(-1, dim)


def _video_files(table: pa.Table) -> list[VideoFile]:
    return [VideoFile(**row) for row in table.select(["path", *_FILE_COLUMNS]).to_pylist()]


def _hits(table: pa.Table, merge: bool) -> list[Hit]:
    """Hits by falling score; the best stands for the windows that it overlaps."""
    starts, ends = table["start_s"].to_pylist(), table["end_s"].to_pylist()
    scores = (1.0 - np.asarray(table["_distance"], np.float64)).tolist()
    files = _video_files(table)
    order = sorted(range(len(table)), key=lambda row: (-scores[row], files[row].path, starts[row]))
    hits: list[Hit] = []
    taken: dict[bytes, list[tuple[float, float]]] = {}
    for row in order:
        spans = taken.setdefault(files[row].path, [])
        if merge and any(starts[row] < end and start < ends[row] for start, end in spans):
            continue
        spans.append((starts[row], ends[row]))
        hits.append(Hit(files[row], starts[row], ends[row], scores[row]))
    return hits
