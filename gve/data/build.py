"""A listing of files and texts -> verified shards; and checks and numbers of shards that exist.

This is where raw files enter, so each one is decoded in a killable child before anything is written.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PilImage

from gve.data.curriculum import TASKS
from gve.data.manifest import MANIFEST, Manifest, Presample, write_atomically
from gve.data.schema import ShardError
from gve.data.shards import QUERY, TARGET, ShardIndex, ShardWriter, files_of
from gve.data.sources import Source, open_root, open_sources
from gve.items import Frames, Image, InputError, Item, Media, Pair, Part, Text, Video
from gve.video import MediaError, Sampling, decode_guarded, decode_image

REJECTS = "rejects.jsonl"
MAX_LINES = 20
"""Bad rows that are named before a build gives up."""

_VERIFY = Sampling.uniform(8)
_CSV_TEXTS = ("caption", "text", "sentence")


class RowError(InputError):
    """One row of a listing cannot be used.

    Args:
        message: one line.
        reason: short slug that is counted.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


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


@dataclass
class BuildResult:
    """What a build did: samples by source, and rejected rows by reason."""

    samples: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)


def build(
    listing: str | Path, out: str | Path, options: BuildOptions, progress: Callable[[int, int], None] | None = None
) -> BuildResult:
    """Writes the shards of a listing into a shard folder, all of them or none.

    Args:
        listing: jsonl of {"query": {"text" | "image" | "video": ...}, "target": {...}, "negatives": [...], "source",
            "task", "instruction"}, or csv with the columns `video` or `image` and `caption` (text to medium), or with
            columns like query_text, query_image and target_video. Paths are relative to the listing.
        out: shard folder.
        options: see there.
        progress: called with (rows done, all rows).

    Raises:
        BadRows: rows cannot be used, and `skip_bad` is off.
        ShardError: the listing cannot be read, the folder cannot be written, or no row is left.
    """
    listing, out = Path(listing), Path(out)
    reader = _Listing(listing, options)
    total, tasks = reader.survey()
    if total == 0:
        raise ShardError(f"{listing} has no rows: give one JSON object a line, or a csv with a header")
    result = BuildResult()
    rejects: list[dict[str, Any]] = []
    with ExitStack() as stack:
        writers: dict[tuple[str, str], ShardWriter] = {}
        for number, pair in reader.pairs():
            if progress:
                progress(number, total)
            if isinstance(pair, RowError):
                result.rejected[pair.reason] += 1
                rejects.append({"row": number, "reason": pair.reason, "message": str(pair)})
                if not options.skip_bad and len(rejects) >= MAX_LINES:
                    break
            elif options.skip_bad or not rejects:
                name = pair.source if len(tasks[pair.source]) == 1 else f"{pair.source}_{pair.task.lower()}"
                if (name, pair.task) not in writers:
                    writers[name, pair.task] = stack.enter_context(_writer(out, name, pair.task, options))
                writers[name, pair.task].write(pair, {"listing": listing.name, "row": number})
                result.samples[name] += 1
        if rejects and not options.skip_bad:
            lines = [f"row {reject['row']}: {reject['message']}" for reject in rejects]
            raise BadRows(lines, more=len(rejects) >= MAX_LINES)
        if not writers:
            raise ShardError(f"{listing}: all {len(rejects)} rows are bad, the first: {rejects[0]['message']}")
    if rejects:
        path = out / REJECTS
        old = path.read_bytes() if path.exists() else b""
        new = "".join(json.dumps({"listing": str(listing), **reject}) + "\n" for reject in rejects)
        write_atomically(path, old + new.encode())
    return result


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


class _Listing:
    """Reads a listing row by row and verifies the media of each pair.

    Args:
        path: of the listing.
        options: of the build.
    """

    def __init__(self, path: Path, options: BuildOptions) -> None:
        self._path, self._options = path, options
        self._seen: dict[Path, RowError | None] = {}
        if not path.is_file():
            raise ShardError(f"listing {path} does not exist")
        stem = re.sub(r"[^a-z0-9_]+", "_", path.stem.lower())[:40]
        self._source = options.source or stem

    def survey(self) -> tuple[int, dict[str, set[str]]]:
        """(rows, source -> its tasks), without opening a media file."""
        total, tasks = 0, dict[str, set[str]]()
        for total, (_, row) in enumerate(self._rows(), 1):  # noqa: B007
            pair = self._parse(row)
            if isinstance(pair, Pair):
                tasks.setdefault(pair.source, set()).add(pair.task)
        return total, tasks

    def pairs(self) -> Iterator[tuple[int, Pair | RowError]]:
        """(row number from 1, verified pair or what is wrong with it), in order; `jobs` rows at a time."""
        waiting: deque[tuple[int, Future[Pair | RowError]]] = deque()
        pool = ThreadPoolExecutor(self._options.jobs)
        try:
            for number, row in self._rows():
                waiting.append((number, pool.submit(self._verified, row)))
                if len(waiting) > 2 * self._options.jobs:
                    number, future = waiting.popleft()
                    yield number, future.result()
            for number, future in waiting:
                yield number, future.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _rows(self) -> Iterator[tuple[int, Any]]:
        """(row number, parsed row or a RowError)."""
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

    def _verified(self, row: Any) -> Pair | RowError:
        pair = self._parse(row)
        if isinstance(pair, RowError):
            return pair
        try:
            return replace(
                pair,
                query=self._check(pair.query),
                target=self._check(pair.target),
                negatives=tuple(self._check(negative) for negative in pair.negatives),
            )
        except RowError as error:
            return error

    def _parse(self, row: Any) -> Pair | RowError:
        """The pair that a row describes, its media still unopened."""
        if isinstance(row, RowError):
            return row
        known = {"query", "target", "negatives", "source", "task", "instruction"}
        try:
            if not isinstance(row, Mapping) or not {"query", "target"} <= set(row) <= known:
                raise RowError(f"a row has `query`, `target` and maybe {sorted(known - {'query', 'target'})}", "row")
            query = self._item(row["query"], row.get("instruction", ""))
            target = self._item(row["target"])
            negatives = tuple(self._item(negative) for negative in row.get("negatives", ()))
            derived = f"{query.modality}2{target.modality}"
            task = row.get("task") or self._options.task or derived
            if task != derived or (task not in TASKS and self._options.level is None):
                raise RowError(
                    f"the pair is {derived}" + (f", not {task}" if task != derived else ", which no level has"), "task"
                )
            if any(negative.modality != target.modality for negative in negatives):
                raise RowError(f"a hard negative is not of the target's modality {target.modality}", "task")
            return Pair(query, target, negatives, source=str(row.get("source") or self._source), task=task)
        except RowError as error:
            return error

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
                parts.append(Text(self._text(value)))
            else:
                parts.append((Image if kind == "image" else Video)(self._path.parent / value, name=value))
        if not parts:
            raise RowError("an item holds nothing", "empty-item")
        if "parts" not in content:  # media stand before text, whatever order the keys have
            parts.sort(key=lambda part: ["Image", "Video", "Text"].index(type(part).__name__))
        return Item(tuple(parts), self._text(instruction) if instruction else "")

    def _text(self, text: str) -> str:
        words = len(text.split())
        if words == 0:
            raise RowError("a text is empty", "empty-text")
        if words > self._options.max_words:
            raise RowError(f"a text of {words} words, max_words is {self._options.max_words}", "too-long")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RowError(f"a text is no valid Unicode: {error}", "unicode") from error
        return text

    def _check(self, item: Item) -> Item:
        """The item with its media verified, and videos as Frames where they are pre-sampled."""
        return replace(
            item, parts=tuple(part if isinstance(part, Text) else self._check_media(part) for part in item.parts)
        )

    def _check_media(self, media: Media) -> Any:
        path = Path(str(media.source))
        presample = self._options.presample if isinstance(media, Video) else None
        if presample is None and path in self._seen:
            if error := self._seen[path]:
                raise error
            return media
        try:
            if isinstance(media, Image):
                self._check_size(media.name, decode_image(path, media.name)[None])
            else:
                sampling = presample.sampling if presample else _VERIFY
                frames = decode_guarded(path, sampling, name=media.name)
                if frames.num_frames < self._options.min_frames:
                    raise RowError(
                        f"{media.name}: {frames.num_frames} frame(s), at least {self._options.min_frames} are asked "
                        "for (--min-frames)",
                        "too-few-frames",
                    )
                self._check_size(media.name, frames.pixels)
                if presample:
                    # The hash of the original file, so that the pair can still be traced to it.
                    return replace(media, source=_shrink(frames, presample.max_frame_px), sha256=media.content_hash())
        except RowError as error:
            self._seen[path] = error
            raise
        except MediaError as error:
            self._seen[path] = RowError(str(error), error.reason)
            raise self._seen[path] from error  # type: ignore[misc]
        except OSError as error:
            raise RowError(f"{media.name}: {error.strerror or error}", "unreadable") from error
        self._seen[path] = None
        return media

    def _check_size(self, name: str, pixels: np.ndarray) -> None:
        height, width = pixels.shape[1:3]
        if min(height, width) < self._options.min_side_px:
            raise RowError(
                f"{name}: {width}x{height} px, at least {self._options.min_side_px} a side are asked for "
                "(--min-side-px)",
                "too-small",
            )


def _from_json(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return RowError(f"no JSON: {error}", "row")


def _from_csv(columns: Mapping[str | None, Any]) -> Any:
    """A csv row in the form of a jsonl row."""
    filled = {name: value for name, value in columns.items() if name and value}
    row: dict[str, Any] = {name: filled[name] for name in ("source", "task", "instruction") if name in filled}
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


def _shrink(frames: Frames, max_frame_px: int) -> Frames:
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
