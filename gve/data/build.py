"""Rows of a reader (a listing, a data set) -> verified shards; and checks and numbers of shards that exist.

This is where raw files enter, so each one is decoded in a killable child before anything is written.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from PIL import Image as PilImage

from gve.data.exclusion import Excluding
from gve.data.manifest import MANIFEST, Manifest, Presample
from gve.data.readers import Dropped, Listing, Reader, Row, RowError
from gve.data.schema import ShardError
from gve.data.shards import QUERY, TARGET, ShardIndex, ShardWriter, files_of
from gve.data.sources import Source, open_root, open_sources
from gve.items import Frames, Image, Item, Pair, Part, Text, Video
from gve.video import MediaError, Sampling, decode_guarded, decode_image

REJECTS = "rejects.jsonl"
MAX_LINES = 20
"""Bad rows that are named before a build gives up."""

_VERIFY = Sampling.uniform(8)
_SEEN = 100_000
"""Files whose verdict is remembered, so that one which many pairs share is decoded once."""


class BadRows(ShardError):
    """A build was refused because of its rows; `lines` name them, one each."""

    def __init__(self, lines: list[str], more: bool) -> None:
        self.lines = lines
        count = f"at least {len(lines)}" if more else str(len(lines))
        rows = lines[0] if len(lines) == 1 else f"{count} bad rows"
        super().__init__(f"nothing was written: {rows}; mend the listing, or pass --on-bad skip")


@dataclass(frozen=True)
class BuildOptions:
    """How a listing becomes shards.

    Args:
        source: name of the source where rows give none; the listing's name when empty.
        task: modality task where rows give none; derived from what the pair holds when empty.
        level: pyramid level; derived from the task when None.
        instruction: query instruction where rows give none.
        presample: store frames instead of the original videos.
        skip_bad: leave bad rows out and list them in rejects.jsonl, instead of refusing the build.
        min_frames: fewest frames of a clip.
        min_side_px: smallest height and width of pictures and frames, in pixels.
        max_words: longest text.
        samples_per_shard: at most 10,000.
        replace: take the place of sources of the same names.
        jobs: files decoded side by side.
        exclude: ids of rows that are left out before anything is decoded (gve.data.exclusion).
    """

    source: str = ""
    task: str = ""
    level: int | None = None
    instruction: str = ""
    presample: Presample | None = None
    skip_bad: bool = False
    min_frames: int = 2
    min_side_px: int = 2
    max_words: int = 20_000
    samples_per_shard: int = 1000
    replace: bool = False
    jobs: int = 2
    exclude: frozenset[str] = frozenset()


@dataclass
class BuildResult:
    """What a build did: samples by source, rows that could not be used by reason, and rows left out by rule."""

    samples: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)


def build(
    rows: str | Path | Reader,
    out: str | Path,
    options: BuildOptions,
    progress: Callable[[int, int | None], None] | None = None,
) -> BuildResult:
    """Writes the shards of a listing or of a data set into a shard folder, all of them or none.

    No more than a few rows are in memory at a time, whatever the number of rows.

    Args:
        rows: a reader, or the path of a listing (gve.data.readers.Listing says what it holds).
        out: shard folder.
        options: see there.
        progress: called with (rows done, all rows or None where that is not known).

    Raises:
        BadRows: rows cannot be used, and `skip_bad` is off.
        ShardError: the rows cannot be read, the folder cannot be written, or no row is left.
    """
    out = Path(out)
    if isinstance(rows, (str, Path)):
        rows = Listing(rows, options.source, options.task, any_task=options.level is not None)
    if options.exclude:
        rows = Excluding(rows, options.exclude)
    result = BuildResult()
    # A data set of millions may lack millions of its clips: what is rejected is not kept in memory either.
    with tempfile.TemporaryFile("w+", encoding="utf-8") as rejects:
        _write_all(rows, out, options, progress, result, rejects)
        if result.rejected:
            rejects.seek(0)
            _append(out / REJECTS, rejects)
    return result


def _write_all(
    reader: Reader,
    out: Path,
    options: BuildOptions,
    progress: Callable[[int, int | None], None] | None,
    result: BuildResult,
    rejects: TextIO,
) -> None:
    total, tasks = reader.survey()
    bad: list[str] = []
    with ExitStack() as stack:
        writers: dict[tuple[str, str], ShardWriter] = {}
        for number, row in _Verifier(options).verified(reader.rows()):
            if progress:
                progress(number, total or None)
            if isinstance(row, Dropped):
                result.dropped[row.reason] += 1
            elif isinstance(row, RowError):
                result.rejected[row.reason] += 1
                reject = {"listing": reader.name, "row": number, "reason": row.reason, "message": str(row)}
                rejects.write(json.dumps(reject) + "\n")
                if len(bad) < MAX_LINES:
                    bad.append(f"row {number}: {row}")
                if not options.skip_bad and len(bad) == MAX_LINES:
                    break
            elif options.skip_bad or not bad:
                name = row.source if len(tasks[row.source]) == 1 else f"{row.source}_{row.task.lower()}"
                if (name, row.task) not in writers:
                    writers[name, row.task] = stack.enter_context(_writer(out, name, row.task, options))
                provenance = {"listing": reader.name, "row": number} | ({"id": row.key} if row.key else {})
                writers[name, row.task].write(row, provenance)
                result.samples[name] += 1
        if bad and not options.skip_bad:
            raise BadRows(bad, more=len(bad) == MAX_LINES)
        if not writers and bad:
            raise ShardError(f"{reader.name}: all {result.rejected.total()} rows are bad, the first: {bad[0]}")
        if not writers:
            dropped = ", ".join(f"{count} {reason}" for reason, count in result.dropped.items())
            raise ShardError(f"{reader.name}: no row is left to write (left out: {dropped or 'none, there is none'})")


def _append(path: Path, lines: TextIO) -> None:
    """Adds lines to a file in one rename: a reader sees all of them or none."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(draft, "w", encoding="utf-8") as file:
            if path.exists():
                with open(path, encoding="utf-8") as old:
                    shutil.copyfileobj(old, file)
            shutil.copyfileobj(lines, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _writer(out: Path, source: str, task: str, options: BuildOptions) -> ShardWriter:
    return ShardWriter(
        out,
        task=task,
        source=source,
        level=options.level,
        samples_per_shard=options.samples_per_shard,
        instruction=options.instruction,
        presample=options.presample,
        replace=options.replace,
    )


class _Verifier:
    """Checks texts and decodes the media of each pair.

    Args:
        options: of the build.
    """

    def __init__(self, options: BuildOptions) -> None:
        self._options = options
        self._seen: dict[str, RowError | None] = {}

    def verified(self, rows: Iterator[tuple[int, Row]]) -> Iterator[tuple[int, Row]]:
        """The rows in order, with what is wrong with a pair in its place; `jobs` rows at a time."""
        waiting: deque[tuple[int, Future[Row]]] = deque()
        pool = ThreadPoolExecutor(self._options.jobs)
        try:
            for number, row in rows:
                waiting.append((number, pool.submit(self._verified, row)))
                if len(waiting) > 2 * self._options.jobs:
                    number, future = waiting.popleft()
                    yield number, future.result()
            for number, future in waiting:
                yield number, future.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _verified(self, row: Row) -> Row:
        if not isinstance(row, Pair):
            return row
        try:
            return replace(
                row,
                query=self._check(row.query),
                target=self._check(row.target),
                negatives=tuple(self._check(negative) for negative in row.negatives),
            )
        except RowError as error:
            return error

    def _check_text(self, text: str) -> None:
        words = len(text.split())
        if words == 0:
            raise RowError("a text is empty", "empty-text")
        if words > self._options.max_words:
            raise RowError(f"a text of {words} words, max_words is {self._options.max_words}", "too-long")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RowError(f"a text is no valid Unicode: {error}", "unicode") from error

    def _check(self, item: Item) -> Item:
        """The item with its texts and media verified, and videos as Frames where they are pre-sampled."""
        if item.instruction:
            self._check_text(item.instruction)
        parts: list[Part] = []
        for part in item.parts:
            if isinstance(part, Text):
                self._check_text(part.text)
                parts.append(part)
            else:
                parts.append(self._check_media(part))
        return replace(item, parts=tuple(parts))

    def _check_media(self, media: Image | Video) -> Image | Video:
        if not isinstance(media.source, (str, Path)):
            return self._decoded(media)
        path, presampled = str(media.source), isinstance(media, Video) and self._options.presample is not None
        if path in self._seen and not presampled:
            if error := self._seen[path]:
                raise error
            return media
        if len(self._seen) >= _SEEN:
            self._seen.clear()
        try:
            found = self._decoded(media)
        except RowError as error:
            self._seen[path] = error
            raise
        self._seen[path] = None
        return found

    def _decoded(self, media: Image | Video) -> Image | Video:
        """The medium, decoded once; a video as Frames where it is pre-sampled.

        Raises:
            RowError: it cannot be decoded, or is too small or too short.
        """
        source = media.source
        assert isinstance(source, (str, Path, bytes))
        try:
            if isinstance(media, Image):
                self._check_size(media.name, decode_image(source, media.name)[None])
                return media
            presample = self._options.presample
            frames = decode_guarded(source, presample.sampling if presample else _VERIFY, name=media.name)
            if frames.num_frames < self._options.min_frames:
                raise RowError(
                    f"{media.name}: {frames.num_frames} frame(s), at least {self._options.min_frames} are asked "
                    "for (--min-frames)",
                    "too-few-frames",
                )
            self._check_size(media.name, frames.pixels)
            if presample is None:
                return media
            # The hash of the original file, so that the pair can still be traced to it.
            return replace(media, source=shrink(frames, presample.max_frame_px), sha256=media.content_hash())
        except MediaError as error:
            raise RowError(str(error), error.reason) from error
        except OSError as error:
            raise RowError(f"{media.name}: {error.strerror or error}", "unreadable") from error

    def _check_size(self, name: str, pixels: np.ndarray) -> None:
        height, width = pixels.shape[1:3]
        if min(height, width) < self._options.min_side_px:
            raise RowError(
                f"{name}: {width}x{height} px, at least {self._options.min_side_px} a side are asked for "
                "(--min-side-px)",
                "too-small",
            )


def shrink(frames: Frames, max_frame_px: int) -> Frames:
    """The frames with at most `max_frame_px` pixels each (height x width), their shape kept; 0 keeps the size."""
    height, width = frames.pixels.shape[1:3]
    if max_frame_px == 0 or height * width <= max_frame_px:
        return frames
    scale = (max_frame_px / (height * width)) ** 0.5
    size = max(1, int(width * scale)), max(1, int(height * scale))
    small = [np.asarray(PilImage.fromarray(f).resize(size, PilImage.Resampling.BICUBIC)) for f in frames.pixels]
    return replace(frames, pixels=np.stack(small))


def check(root: str | Path, progress: Callable[[int, int], None] | None = None) -> list[str]:
    """Compares every byte of a shard folder with its indexes and its manifest.

    Returns:
        One line per problem; empty when all is well.

    Raises:
        ShardError: there is no manifest of this schema version.
    """
    root = Path(root)
    if not (root / MANIFEST).is_file():
        raise ShardError(f"{root} holds no {MANIFEST}: give a local folder that `gve shards build` wrote")
    manifest = Manifest.load(root)
    total, done = sum(len(record.shards) for record in manifest.sources.values()), 0
    problems = [] if manifest.sources else [f"{MANIFEST} lists no source"]
    for record in manifest.sources.values():
        rows = []
        try:
            Source(open_root(root), record).verify()
        except ShardError as error:
            problems.append(str(error))
        for number, shard in enumerate(record.shards):
            done += 1
            if progress:
                progress(done, total)
            try:
                scanned = ShardIndex.scan(root / shard.file, record.name, number)
                stored = ShardIndex.load((root / shard.file).with_suffix(".idx"))
                if (scanned.sha256, scanned.bytes, len(scanned.rows)) != (shard.sha256, shard.bytes, shard.count):
                    problems.append(f"{shard.file} is not the file that the manifest names")
                if scanned.sha256 != stored.sha256 or not np.array_equal(scanned.rows, stored.rows):
                    problems.append(f"{shard.file} does not match its index file")
                rows.append(scanned.rows)
            except (ShardError, OSError) as error:
                problems.append(str(error))
        index = root / record.index
        if len(rows) == len(record.shards) and index.is_file():
            combined = np.load(index, allow_pickle=False)
            if not np.array_equal(np.concatenate(rows), combined):
                problems.append(f"{record.index} does not match the shards of {record.name}")
    known = {file for record in manifest.sources.values() for file in files_of(record)}
    on_disk = {path.relative_to(root).as_posix() for path in root.glob("level*/*/*") if path.is_file()}
    problems += [f"{file} is in no source of the manifest: delete it" for file in sorted(on_disk - known)]
    problems += [f"{path.name} was left by an interrupted build: delete it" for path in sorted(root.glob(".staging-*"))]
    return list(dict.fromkeys(problems))


def stats(root: str | Path) -> dict[str, Any]:
    """Numbers of a shard folder, from its indexes alone.

    Returns:
        {"samples", "bytes", "tasks": task -> samples, "levels": level -> samples, "sources": name -> {"task", "level",
        "samples", "shards", "bytes", "queries", "targets", "presample", "instruction"}}; `queries` and `targets` count
        distinct contents.

    Raises:
        ShardError: the shards do not match their manifest.
    """
    sources = open_sources(root)
    tasks: Counter[str] = Counter()
    levels: Counter[str] = Counter()
    rows = {}
    for name, source in sources.items():
        record = source.record
        tasks[record.task] += record.count
        levels[str(record.level)] += record.count
        rows[name] = {
            "task": record.task,
            "level": record.level,
            "samples": record.count,
            "shards": len(record.shards),
            "bytes": record.bytes,
            "queries": len(np.unique(source.index[:, QUERY])),
            "targets": len(np.unique(source.index[:, TARGET])),
            "presample": str(record.presample.sampling) if record.presample else "",
            "instruction": record.instruction,
        }
    return {
        "samples": tasks.total(),
        "bytes": sum(source.record.bytes for source in sources.values()),
        "tasks": dict(sorted(tasks.items())),
        "levels": dict(sorted(levels.items())),
        "sources": rows,
    }
