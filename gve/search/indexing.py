"""Folders into an index: what is new, changed or gone, and the vectors of what is new."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gve.encode.encoder import Encoder, item_key, progress_bar
from gve.encode.ranks import broadcast, world
from gve.encode.store import EmbeddingStore, encode_items
from gve.items import InputError, Item, Video
from gve.search.files import Found, VideoFile, Walk, look_into, sha256_of
from gve.search.index import Clips, Index, Rejected, local
from gve.search.windows import Windows
from gve.video import MediaError

WINDOWS_PER_COMMIT = 2048
"""What is encoded before it can be searched. A commit costs some 20 ms, and many small ones slow every search."""
MAX_BYTES = 64 << 30
COMMITS_PER_COMPACTION = 64


@dataclass
class Changes:
    """What an index lacks of a walk.

    Args:
        new, changed: files to look into.
        unchanged: files that stand in the index as they are.
        vanished: file id -> printable name, of indexed files that the walk should have met.
        known_bad: files that were looked at before and are no videos; they have not changed.
        huge: files above the limit of bytes.
        forgotten: ids of bad files that are gone.
        indexed: file id -> what the index says of it.
    """

    new: list[Found] = field(default_factory=list)
    changed: list[Found] = field(default_factory=list)
    unchanged: int = 0
    vanished: dict[str, str] = field(default_factory=dict)
    known_bad: int = 0
    huge: list[Found] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)
    indexed: dict[str, VideoFile] = field(default_factory=dict)

    @property
    def to_inspect(self) -> list[Found]:
        """New and changed files by path."""
        return sorted([*self.new, *self.changed], key=lambda found: found.path)


@dataclass
class Update:
    """What an indexing did.

    Args:
        added, changed, pruned: files.
        touched: files that were written again with the same content.
        windows: of the files added and changed.
        reused: of these, windows whose vectors were known: a file moved or copied, or an interrupted run.
        rejected: printable name -> why it is no video that can be used.
        damaged: printable name -> the first window that could not be read and how many could not; the others are
            indexed.
        unstable: files that changed while they were read; the next run takes them.
    """

    added: int = 0
    changed: int = 0
    pruned: int = 0
    touched: int = 0
    windows: int = 0
    reused: int = 0
    rejected: dict[str, str] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)
    unstable: list[str] = field(default_factory=list)


def compare(index: Index | None, walk: Walk, *, max_bytes: int = MAX_BYTES, retry: bool = False) -> Changes:
    """What is new, by size and time of change; nothing is opened.

    Args:
        index: None where there is none yet.
        max_bytes: larger files are left out, and named.
        retry: look again into files that were rejected.
    """
    files = index.files() if index else {}
    rejected = index.rejected() if index else {}
    changes = Changes(indexed=files)
    met = set()
    for found in walk.found:
        own = found.file_id
        met.add(own)
        stamp = (found.size_bytes, found.mtime_ns)
        if found.size_bytes > max_bytes:
            changes.huge.append(found)
        elif own in files:
            if (files[own].size_bytes, files[own].mtime_ns) == stamp:
                changes.unchanged += 1
            else:
                changes.changed.append(found)
        elif own in rejected and (rejected[own].size_bytes, rejected[own].mtime_ns) == stamp and not retry:
            changes.known_bad += 1
        else:
            changes.new.append(found)
    gone = {own: file for own, file in files.items() if own not in met and walk.covers(file.path)}
    changes.vanished = {own: file.name for own, file in gone.items()}
    changes.forgotten = [own for own, file in rejected.items() if own not in met and walk.covers(file.path)]
    return changes


@dataclass(frozen=True)
class Inspected:
    """A file that was looked into.

    Args:
        found: the file.
        file: what it holds; None where it is no video that can be used.
        reason: why not.
        touched: it stands in the index with the same content.
    """

    found: Found
    file: VideoFile | None = None
    reason: str = ""
    touched: bool = False


def inspect(changes: Changes, *, jobs: int = 2) -> Iterator[Inspected]:
    """Looks into new and changed files, by path, in children that can be killed.

    Args:
        jobs: files looked into at a time.
    """
    files = changes.to_inspect

    def one(found: Found) -> Inspected:
        now_ns = time.time_ns()
        try:
            known = changes.indexed.get(found.file_id)
            digest = ""
            if known is not None and known.size_bytes == found.size_bytes:
                digest = sha256_of(found.path)
                if digest == known.sha256:
                    return Inspected(found, known, touched=True)
            info = look_into(found.path)
            digest = digest or sha256_of(found.path)
        except MediaError as error:
            return Inspected(found, reason=str(error))
        file = VideoFile(
            found.path,
            found.size_bytes,
            found.settled_ns(now_ns),
            digest,
            info.duration_s,
            info.width,
            info.height,
            info.native_fps,
            info.codec,
        )
        return Inspected(found, file)

    with ThreadPoolExecutor(max(1, jobs)) as pool:
        # Some at a time: a million files must not all be read before the first one is encoded.
        step = 16 * max(1, jobs)
        for start in range(0, len(files), step):
            yield from pool.map(one, files[start : start + step])


@dataclass
class _Batch:
    """Whole files that are encoded and committed together.

    Args:
        files: with what was found of them.
        spans: of each file.
        known: key -> vector, of windows that stand in the index under another path.
        title: of the progress bar.
    """

    files: list[tuple[Found, VideoFile]]
    spans: list[list[tuple[float, float]]]
    known: dict[str, np.ndarray]
    title: str

    @property
    def items(self) -> list[Item]:
        pairs = zip(self.files, self.spans, strict=True)
        return [window_item(file, span) for (_, file), spans in pairs for span in spans]


def window_item(file: VideoFile, span: tuple[float, float]) -> Item:
    """What is embedded of a window; a window that is the whole file is the file."""
    whole = span[0] == 0 and span[1] >= file.duration_s
    return Item((Video(os.fsdecode(file.path), file.sha256, file.name, None if whole else span),))


def update_index(
    index: Index,
    changes: Changes,
    encoder: Encoder,
    *,
    prune: bool = False,
    batch_windows: int = WINDOWS_PER_COMMIT,
    jobs: int = 2,
    progress: bool = False,
) -> Update:
    """Brings an index up to date; a collective where ranks exist, of which rank 0 alone writes.

    Killed at any time, it leaves an index that can be searched and the vectors of the commit it was making: the same
    call goes on from there.

    Args:
        index: of this encoder; `check_record` says whether it is.
        changes: what it lacks; on rank 0, the others' are not read.
        prune: forget vanished files.
        batch_windows: windows encoded before they are committed.
        jobs: files looked into at a time.

    Raises:
        InputError: another process is writing.
    """
    update = Update()
    with _writing(index.uri) if world()[0] == 0 else _nothing():
        if world()[0] == 0:
            if prune:
                index.delete(changes.vanished)
                update.pruned = len(changes.vanished)
            index.delete(changes.forgotten)
        batches = _batches(index, changes, update, batch_windows, jobs, progress) if world()[0] == 0 else iter(())
        commits = 0
        while True:
            batch: _Batch | None = broadcast(next(batches, None))
            if batch is None:
                break
            _encode(index, batch, encoder, changes, update, progress)
            commits += 1
            if commits % COMMITS_PER_COMPACTION == 0 and world()[0] == 0:
                index.compact()
        if world()[0] == 0 and (commits or update.pruned or update.rejected):
            index.compact()
    return update


def _batches(
    index: Index, changes: Changes, update: Update, batch_windows: int, jobs: int, progress: bool
) -> Iterator[_Batch]:
    """Files looked into and gathered; what needs no vector is committed on the way."""
    todo = changes.to_inspect
    files: list[tuple[Found, VideoFile]] = []
    spans: list[list[tuple[float, float]]] = []
    bad: list[Rejected] = []

    def batch() -> _Batch:
        index.reject(bad)
        own = _Batch(files[:], spans[:], _known(index, files), f"indexing, file {done} of {len(todo)}")
        files.clear()
        spans.clear()
        bad.clear()
        return own

    done = 0
    looked = inspect(changes, jobs=jobs)
    while done < len(todo):
        with progress_bar("looking into files" if progress else "", len(todo)) as advance:
            advance(done)
            for seen in looked:
                done += 1
                advance(1)
                if seen.file is None:
                    mtime_ns = seen.found.settled_ns(time.time_ns())
                    bad.append(Rejected(seen.found.path, seen.found.size_bytes, mtime_ns, seen.reason))
                    update.rejected[seen.found.name] = seen.reason
                elif seen.touched:
                    index.touch(seen.found.file_id, seen.found.size_bytes, seen.found.settled_ns(time.time_ns()))
                    update.touched += 1
                else:
                    files.append((seen.found, seen.file))
                    spans.append(index.record.windows.spans(seen.file.duration_s))
                if sum(map(len, spans)) >= batch_windows:
                    break
        yield batch()


def _known(index: Index, files: Sequence[tuple[Found, VideoFile]]) -> dict[str, np.ndarray]:
    """Keys and vectors of contents that the index has, whatever they were called: files moved or copied."""
    by_hash = {file.sha256: file for _, file in files}
    known = {}
    for sha256, span, vector in index.known_content(list(by_hash)):
        known[item_key(window_item(by_hash[sha256], span))] = vector
    return known


def _encode(index: Index, batch: _Batch, encoder: Encoder, changes: Changes, update: Update, progress: bool) -> None:
    """Encodes a batch on all ranks and commits it."""
    rank = world()[0]
    items = batch.items
    # Vectors of a commit that is being made outlive a kill; those of an address in a store have no folder.
    draft = Path(index.uri) / "draft" if local(index.uri) else None
    store = EmbeddingStore(draft, index.record.fingerprint)
    store.add(list(batch.known), list(batch.known.values()), write=False)
    store.added = 0  # what was known is not what was encoded
    encoded = encode_items(encoder, items, store, progress=batch.title if progress else "")
    if rank != 0:
        return
    changed = {found.file_id for found in changes.changed}
    ready, bad = [], []
    start = 0
    for (found, file), spans in zip(batch.files, batch.spans, strict=True):
        rows = range(start, start + len(spans))
        start += len(spans)
        if not found.unchanged():
            update.unstable.append(found.name)
            continue
        good = [row for row in rows if row not in encoded.failures]
        reasons = [encoded.failures[row] for row in rows if row in encoded.failures]
        if not good:
            bad.append(Rejected(found.path, found.size_bytes, file.mtime_ns, reasons[0]))
            update.rejected[found.name] = reasons[0]
            continue
        if reasons:
            update.damaged[found.name] = f"{len(reasons)} of {len(spans)} windows cannot be read: {reasons[0]}"
        ready.append(Clips(file, [spans[row - rows.start] for row in good], encoded.vectors[good]))
        update.windows += len(good)
        update.changed += found.file_id in changed
        update.added += found.file_id not in changed
    update.reused += max(0, len(items) - len(encoded.failures) - store.added)
    index.add(ready)
    index.reject(bad)
    if draft is not None:
        shutil.rmtree(draft, ignore_errors=True)


def check_record(index: Index, encoder: Encoder, windows: Windows, model: str) -> None:
    """Refuses to mix vectors of two models, or windows of two policies.

    Args:
        windows: what is asked for.
        model: name of the encoder's model.

    Raises:
        InputError: names what differs.
    """
    record = index.record
    if encoder.fingerprint != record.fingerprint:
        raise InputError(
            f"index {index.uri} was made by model {record.model!r} (fingerprint {record.fingerprint[:12]}), {model!r} "
            f"under these settings is another (fingerprint {encoder.fingerprint[:12]}): their vectors do not compare. "
            "Use that model, or build another index"
        )
    if windows != record.windows:
        raise InputError(f"index {index.uri} holds {record.windows}, not {windows}: build another index for these")


@contextmanager
def _writing(uri: str) -> Iterator[None]:
    """Holds the lock of a local index; it falls with the process, however that ends."""
    if not local(uri):
        yield
        return
    import fcntl

    with open(Path(uri) / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"index {uri} is being written by another process: wait for it") from None
        yield


@contextmanager
def _nothing() -> Iterator[None]:
    yield
