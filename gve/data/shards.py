"""Writing shards: WebDataset tars with an index beside each, complete or not there at all.

Layout under the root of a shard folder::

    manifest.json                       explicit list of sources and shards (gve.data.manifest)
    level2/T2V/web-000000.tar           samples web_000000_0000, web_000000_0001, ... (gve.data.schema)
    level2/T2V/web-000000.idx           its index: safetensors with `rows` and, as metadata, count, size and sha256
    level2/T2V/web.index.npy            rows of all shards of the source, memory-mapped by readers

An index row is 40 bytes, five unsigned 64-bit numbers; the columns are OFFSET, SIZE, CHECK, QUERY and TARGET.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import mmap
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import save

from gve.data.curriculum import level_of
from gve.data.manifest import Manifest, Presample, ShardRecord, SourceRecord, edit_manifest, write_atomically
from gve.data.schema import (
    SCHEMA,
    ShardError,
    check_modalities,
    check_source_name,
    content_ids,
    decode_sample,
    encode_sample,
)
from gve.items import Frames, Pair, Video

OFFSET, SIZE, CHECK, QUERY, TARGET = range(5)
"""Columns of an index: first byte of the sample in its tar, its bytes, the first 8 bytes of their SHA-256, and the
content ids of query and target."""

_BLOCK = 512


def tar_members(data: bytes | mmap.mmap, name: str) -> Iterator[tuple[str, int, int, int]]:
    """Walks plain USTAR members, verifying each header's checksum.

    Why not tarfile: this is the hot path of training (one call a sample), and tarfile takes a cut file for a short one.

    Args:
        data: a whole tar or whole samples cut out of one.
        name: what to call it in messages.

    Yields:
        (member name, offset of its header, offset of its content, size of its content).

    Raises:
        ShardError: a damaged header, a member that is no plain file, or content cut off.
    """
    offset = 0
    while offset + _BLOCK <= len(data) and data[offset] != 0:
        header = data[offset : offset + _BLOCK]
        try:
            stored, size = int(header[148:154], 8), int(header[124:135], 8)
        except ValueError as error:
            raise ShardError(f"{name}: no tar header at byte {offset}: rebuild the shard") from error
        if stored != sum(header) - sum(header[148:156]) + 8 * ord(" "):
            raise ShardError(f"{name}: damaged tar header at byte {offset}: rebuild the shard")
        if header[156:157] not in (b"0", b"\0") or header[345] != 0:
            raise ShardError(f"{name}: member at byte {offset} is no plain USTAR file: build shards with `gve shards`")
        if offset + _BLOCK + size > len(data):
            raise ShardError(f"{name}: cut off after {len(data)} bytes: rebuild the shard")
        yield header[:100].rstrip(b"\0").decode(), offset, offset + _BLOCK, size
        offset += _BLOCK + -(-size // _BLOCK) * _BLOCK


def split_sample(data: bytes, name: str) -> dict[str, bytes]:
    """The members of one sample, field -> bytes, from its bytes in the tar."""
    return {member.partition(".")[2]: data[start : start + size] for member, _, start, size in tar_members(data, name)}


@dataclass(frozen=True)
class ShardIndex:
    """What the index file of one shard says.

    Args:
        rows: [samples, 5] uint64, see OFFSET and the other columns.
        bytes: size of the tar.
        sha256: of the tar.
    """

    rows: np.ndarray
    bytes: int
    sha256: str

    @classmethod
    def scan(cls, path: Path, source: str, shard: int) -> ShardIndex:
        """Reads a whole shard and checks it: every sample whole, its members together, its key in place.

        Raises:
            ShardError: the first thing that does not hold.
        """
        if path.stat().st_size == 0:
            raise ShardError(f"{path}: an empty file is no shard: rebuild it")
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            starts: dict[str, int] = {}
            key, end = "", 0
            for member, offset, start, size in tar_members(data, path.name):
                if member.partition(".")[0] != key:
                    key = member.partition(".")[0]
                    if key != sample_key(source, shard, len(starts)):
                        raise ShardError(f"{path.name}: found sample {key} at place {len(starts)}: rebuild the shard")
                    starts[key] = offset
                end = start + -(-size // _BLOCK) * _BLOCK
            if not starts:
                raise ShardError(f"{path}: the shard holds no sample: rebuild it")
            if len(data) < end + 2 * _BLOCK or any(data[end : end + 2 * _BLOCK]):
                raise ShardError(f"{path.name}: no end mark after byte {end}, the file is cut off: rebuild the shard")
            bounds = [*starts.values(), end]
            rows = np.empty((len(starts), 5), np.uint64)
            for row, (sample, first, last) in enumerate(zip(starts, bounds, bounds[1:], strict=False)):
                raw = data[first:last]
                pair = decode_sample(split_sample(raw, path.name), pixels=False)
                if pair.key != sample:
                    raise ShardError(f"{path.name}: sample {sample} calls itself {pair.key}: rebuild the shard")
                rows[row] = (first, last - first, checksum(raw), *content_ids(pair))
            return cls(rows, len(data), hashlib.sha256(data).hexdigest())

    def save(self, path: Path) -> None:
        metadata = {
            "schema": str(SCHEMA),
            "count": str(len(self.rows)),
            "bytes": str(self.bytes),
            "sha256": self.sha256,
        }
        write_atomically(path, save({"rows": self.rows}, metadata))

    @classmethod
    def load(cls, path: Path) -> ShardIndex:
        """Reads the index file of a shard.

        Raises:
            ShardError: it is missing, damaged or of another schema version.
        """
        try:
            with safetensors.safe_open(path, "np") as file:
                metadata, rows = file.metadata(), file.get_tensor("rows")
            if metadata["schema"] != str(SCHEMA):
                raise ShardError(
                    f"{path} has schema version {metadata['schema']}, this code reads {SCHEMA}: rebuild it"
                )
            return cls(rows, int(metadata["bytes"]), metadata["sha256"])
        except (OSError, KeyError, TypeError, safetensors.SafetensorError) as error:
            raise ShardError(f"{path} is no shard index ({error}): rebuild the shards") from error


def sample_key(source: str, shard: int, place: int) -> str:
    """Globally unique key of a sample: `<source>_<shard>_<place>`."""
    return f"{source}_{shard:06d}_{place:04d}"


def checksum(sample: bytes) -> int:
    """First 8 bytes of the SHA-256 of a sample's bytes in the tar."""
    return int.from_bytes(hashlib.sha256(sample).digest()[:8], "big")


class ShardWriter:
    """Writes one source. Use as a context manager: an exception inside leaves no trace of the source.

    Shards grow in a hidden folder; `close` moves them into place and then names them in the manifest, so a reader
    sees the whole source or none of it.

    Args:
        root: shard folder; made when absent. Several writers, one per source, may work on it at once.
        task: modality task of every pair, for example "T2V".
        source: name of the source, unique in the folder: [a-z0-9_], at most 40 letters.
        level: pyramid level; derived from the task when None.
        samples_per_shard: at most 10,000 (keys have four digits).
        instruction: query instruction of pairs that have none.
        presample: policy by which videos were reduced to Frames; None stores original files.
        replace: whether a source of this name may be there already; it is replaced when this one is complete.

    Raises:
        ShardError: a bad name, task or size, a source that exists, or a folder that cannot be written.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        task: str,
        source: str,
        level: int | None = None,
        samples_per_shard: int = 1000,
        instruction: str = "",
        presample: Presample | None = None,
        replace: bool = False,
    ) -> None:
        check_source_name(source)
        level = level_of(task) if level is None else level
        if level not in (1, 2, 3) or not 1 <= samples_per_shard <= 10_000:
            raise ShardError(f"level {level}, {samples_per_shard} samples per shard: use 1 to 3, and 1 to 10000")
        self.root = Path(root)
        self.count = 0
        self._source, self._task, self._level = source, task, level
        self._samples_per_shard, self._instruction, self._presample = samples_per_shard, instruction, presample
        self._replace = replace
        self._shards: list[ShardRecord] = []
        self._rows: list[np.ndarray] = []
        self._tar: Any = None
        self._made = [folder for folder in (self.root, *self.root.parents) if not folder.exists()]
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            _remove_dead_staging(self.root)
            prefix = f".staging-{socket.gethostname()}-{os.getpid()}-"
            self._staging = Path(tempfile.mkdtemp(prefix=prefix, dir=self.root))
        except OSError as error:
            self._remove_made()
            raise ShardError(f"cannot write to {self.root} ({error.strerror}): choose another folder") from error
        if source in Manifest.load(self.root).sources and not replace:
            self.abort()
            raise ShardError(f"{self.root} has a source {source} already: choose another name, or replace it")

    def write(self, pair: Pair, provenance: Mapping[str, Any] | None = None) -> str:
        """Appends one pair and returns its key.

        Args:
            pair: its `key`, `source` and `task` are set by the writer.
            provenance: JSON-able facts, stored with the sample.

        Raises:
            InputError: the pair does not hold what the task asks for, or cannot be stored.
            OSError: a media file cannot be read, or the disk is full.
        """
        check_modalities(pair, self._task)
        for item in (pair.query, pair.target, *pair.negatives):
            for media in item.media:
                if isinstance(media, Video) and isinstance(media.source, Frames) != (self._presample is not None):
                    wanted = "Frames" if self._presample else "a file (name the policy by `presample` to store Frames)"
                    raise ShardError(f"source {self._source} takes videos as {wanted}")
        if not pair.query.instruction and self._instruction:
            pair = replace(pair, query=replace(pair.query, instruction=self._instruction))
        pair = replace(pair, source=self._source, task=self._task)
        shard, place = divmod(self.count, self._samples_per_shard)
        key = sample_key(self._source, shard, place)
        quality = self._presample.jpeg_quality if self._presample else 95
        members = encode_sample(pair, key, self._level, jpeg_quality=quality, provenance=provenance)
        if place == 0:
            self._finish_shard()
            self._open_shard(shard)
        self._tar.write({"__key__": key, **members})
        self.count += 1
        return key

    def close(self) -> SourceRecord:
        """Publishes the source and returns its manifest record.

        Raises:
            ShardError: nothing was written.
        """
        try:
            if self.count == 0:
                raise ShardError(f"source {self._source}: no sample was written")
            self._finish_shard()
            return self._publish()
        finally:
            self.abort()

    def abort(self) -> None:
        """Removes what is not published; harmless after `close`."""
        if self._tar is not None:
            with contextlib.suppress(OSError):  # the disk may be full, which is why we are here
                self._tar.close()
                self._stream.close()
            self._tar = None
        shutil.rmtree(self._staging, ignore_errors=True)
        self._remove_made()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _open_shard(self, shard: int) -> None:
        os.environ.setdefault("WDS_SECURE", "1")  # read once, on import: no `pipe:` addresses, no rewriting
        from webdataset.writer import TarWriter  # imports torch: 4 s that readers of shards need not pay

        self._stream = open(self._staging / f"{self._source}-{shard:06d}.tar", "wb")  # noqa: SIM115
        # Fixed owner and time: equal samples give equal bytes. encoder=False: bytes go in as they are.
        self._tar = TarWriter(self._stream, user="", group="", mtime=0, encoder=False)

    def _finish_shard(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        self._tar = None
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        path = Path(self._stream.name)
        index = ShardIndex.scan(path, self._source, len(self._shards))
        index.save(path.with_suffix(".idx"))
        self._shards.append(ShardRecord(f"{self._folder}/{path.name}", len(index.rows), index.bytes, index.sha256))
        self._rows.append(index.rows)

    @property
    def _folder(self) -> str:
        return f"level{self._level}/{self._task}"

    def _publish(self) -> SourceRecord:
        buffer = io.BytesIO()
        np.save(buffer, np.concatenate(self._rows), allow_pickle=False)
        combined = f"{self._source}.index.npy"
        write_atomically(self._staging / combined, buffer.getvalue())
        record = SourceRecord(
            name=self._source,
            task=self._task,
            level=self._level,
            instruction=self._instruction,
            index=f"{self._folder}/{combined}",
            index_sha256=hashlib.sha256(buffer.getvalue()).hexdigest(),
            presample=self._presample,
            shards=tuple(self._shards),
        )
        folder = self.root / self._folder
        self._made = [made for made in (folder, folder.parent) if not made.exists()] + self._made
        folder.mkdir(parents=True, exist_ok=True)
        with edit_manifest(self.root) as sources:
            old = sources.get(self._source)
            if old is not None and not self._replace:
                raise ShardError(f"{self.root} has a source {self._source} already: choose another name, or replace it")
            for file in sorted(self._staging.iterdir()):
                os.replace(file, folder / file.name)
            sources[self._source] = record
        self._made = []
        if old is not None:
            _remove_files(self.root, files_of(old) - files_of(record))
        return record

    def _remove_made(self) -> None:
        """Removes the folders this writer made, as long as they are empty."""
        for folder in self._made:
            try:
                if folder == self.root:
                    (folder / ".manifest.lock").unlink(missing_ok=True)
                folder.rmdir()
            except OSError:
                return


def files_of(record: SourceRecord) -> set[str]:
    """Every file of a source, relative to the shard folder."""
    tars = [shard.file for shard in record.shards]
    return {record.index, *tars, *(str(Path(tar).with_suffix(".idx")) for tar in tars)}


def _remove_files(root: Path, files: set[str]) -> None:
    for file in files:
        (root / file).unlink(missing_ok=True)


def _remove_dead_staging(root: Path) -> None:
    """Removes what a killed writer of this machine left: its process is gone."""
    for folder in root.glob(f".staging-{socket.gethostname()}-*"):
        pid = folder.name.rsplit("-", 2)[1]
        if not Path("/proc", pid).exists() and Path("/proc").exists():
            shutil.rmtree(folder, ignore_errors=True)
