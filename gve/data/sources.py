"""Reading shards by row: one memory-mapped index per source, one read (or range request) per sample.

A shard folder may be local or at an http(s) or s3 address; other schemes are refused (webdataset's `pipe:` runs a
shell). Rows are numbered through the shards of a source in the order of the manifest.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from gve.data.manifest import MANIFEST, Manifest, SourceRecord
from gve.data.schema import ShardError, decode_sample
from gve.data.shards import CHECK, OFFSET, SIZE, checksum, sample_key, split_sample
from gve.items import Pair

SCHEMES = ("file", "http", "https", "s3")


class LocalRoot:
    """Files of a folder on this machine. Keeps the last few shards open; each process opens its own.

    Args:
        path: the shard folder.
        max_open: shards kept open at once.
    """

    def __init__(self, path: Path, max_open: int = 64) -> None:
        self.path = path
        self._max_open = max_open
        self._open: OrderedDict[str, int] = OrderedDict()
        self._pid = os.getpid()

    def read(self, file: str) -> bytes:
        return (self.path / file).read_bytes()

    def size(self, file: str) -> int:
        return (self.path / file).stat().st_size

    def read_range(self, file: str, offset: int, size: int) -> bytes:
        if self._pid != os.getpid():  # forked: the parent may close its numbers, and pread needs no shared position
            self._open, self._pid = OrderedDict(), os.getpid()
        descriptor = self._open.pop(file, None)
        if descriptor is None:
            descriptor = os.open(self.path / file, os.O_RDONLY)
        self._open[file] = descriptor
        if len(self._open) > self._max_open:
            os.close(self._open.popitem(last=False)[1])
        return os.pread(descriptor, size, offset)

    def index(self, file: str) -> np.ndarray:
        return np.load(self.path / file, mmap_mode="r", allow_pickle=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_max_open": self._max_open, "_open": OrderedDict(), "_pid": -1}

    def __str__(self) -> str:
        return str(self.path)


class RemoteRoot:
    """Files below an http(s) or s3 address, through fsspec; an index is held in memory.

    Args:
        url: address of the shard folder.

    Raises:
        ShardError: the scheme is not allowed, or the package that speaks it is not installed.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        try:
            self._files, self._path = fsspec.core.url_to_fs(url.rstrip("/"))
        except ImportError as error:
            raise ShardError(f"{url}: {error}") from error
        self.url = url

    def read(self, file: str) -> bytes:
        return self._files.cat_file(f"{self._path}/{file}")

    def size(self, file: str) -> int:
        return self._files.size(f"{self._path}/{file}")

    def read_range(self, file: str, offset: int, size: int) -> bytes:
        return self._files.cat_file(f"{self._path}/{file}", start=offset, end=offset + size)

    def index(self, file: str) -> np.ndarray:
        return np.load(io.BytesIO(self.read(file)), allow_pickle=False)

    def __str__(self) -> str:
        return self.url


Root = LocalRoot | RemoteRoot


def open_root(root: str | Path) -> Root:
    """A shard folder by path or address.

    Raises:
        ShardError: the scheme is not one of SCHEMES.
    """
    scheme, separator, path = str(root).partition("://")
    if not separator:
        if str(root).startswith("pipe:"):
            raise ShardError(f"{root}: pipes are refused; give a folder or an address of {', '.join(SCHEMES)}")
        return LocalRoot(Path(root))
    if scheme not in SCHEMES:
        raise ShardError(f"{root}: scheme {scheme!r} is refused; use one of {', '.join(SCHEMES)}")
    return LocalRoot(Path(path)) if scheme == "file" else RemoteRoot(str(root))


class Source:
    """One source of a shard folder: `len(source)` samples, read by row.

    Pickles small: workers map the index again.

    Args:
        root: the folder it lies in.
        record: its entry of the manifest.
    """

    def __init__(self, root: Root, record: SourceRecord) -> None:
        self.root = root
        self.record = record
        self.shard_sizes = np.array([shard.count for shard in record.shards], np.int64)
        self._starts = np.concatenate(([0], np.cumsum(self.shard_sizes)))
        self._index: np.ndarray | None = None

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def index(self) -> np.ndarray:
        """[rows, 5] uint64, columns OFFSET, SIZE, CHECK, QUERY, TARGET of gve.data.shards."""
        if self._index is None:
            self._index = self.root.index(self.record.index)
        return self._index

    def verify(self) -> None:
        """Compares index and shard sizes with the manifest; `check` of gve.data.build compares every byte.

        Raises:
            ShardError: a file is missing, cut, or of another build.
        """
        try:
            if hashlib.sha256(self.root.read(self.record.index)).hexdigest() != self.record.index_sha256:
                raise ShardError(f"{self.record.index} does not match the manifest of {self.root}: rebuild {self.name}")
            if self.index.shape != (len(self), 5) or self.index.dtype != np.uint64:
                raise ShardError(f"{self.record.index} does not have {len(self)} rows: rebuild {self.name}")
            for shard in self.record.shards:
                if shard.count < 1:
                    raise ShardError(f"{shard.file} of {self.root} holds no sample: rebuild {self.name}")
                size = self.root.size(shard.file)
                if size != shard.bytes:
                    raise ShardError(
                        f"{shard.file} of {self.root} has {size} bytes, the manifest says {shard.bytes}: "
                        f"copy it again or rebuild {self.name}"
                    )
        except OSError as error:
            raise ShardError(f"source {self.name} of {self.root} cannot be read: {error}") from error

    def __len__(self) -> int:
        return int(self._starts[-1])

    def key(self, row: int) -> str:
        """Sample key of a row."""
        shard = int(np.searchsorted(self._starts, row, side="right")) - 1
        return sample_key(self.name, shard, row - int(self._starts[shard]))

    def read(self, row: int, *, pixels: bool = True) -> Pair:
        """One pair; media keep their file bytes, pre-sampled videos are Frames.

        Args:
            row: from 0.
            pixels: False leaves pre-sampled frames undecoded: enough for texts and content hashes.

        Raises:
            ShardError: the bytes are not the ones that were indexed.
            gve.video.MediaError: a stored frame cannot be decoded.
            OSError: the shard cannot be read.
        """
        return decode_sample(self.members(row), pixels=pixels)

    def members(self, row: int) -> dict[str, bytes]:
        """The stored members of one row, `json` among them: field -> bytes.

        Raises:
            ShardError: the bytes are not the ones that were indexed.
            OSError: the shard cannot be read.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} in source {self.name}")
        shard = int(np.searchsorted(self._starts, row, side="right")) - 1
        entry = self.index[row]
        data = self.root.read_range(self.record.shards[shard].file, int(entry[OFFSET]), int(entry[SIZE]))
        if checksum(data) != int(entry[CHECK]):
            raise ShardError(f"{self.key(row)}: its bytes are not the ones indexed: run `gve shards check`")
        return split_sample(data, self.key(row))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_index": None}


def open_sources(root: str | Path) -> dict[str, Source]:
    """The verified sources of a shard folder, by name.

    Raises:
        ShardError: no manifest there, another schema version, or a source that does not match it.
    """
    where = open_root(root)
    try:
        data = where.read(MANIFEST)
    except OSError as error:
        raise ShardError(f"{where} holds no {MANIFEST}: give a folder that `gve shards build` wrote") from error
    manifest = Manifest.parse(data, f"{where}/{MANIFEST}")
    if not manifest.sources:
        raise ShardError(f"{where}/{MANIFEST} lists no source: build some with `gve shards build`")
    sources = {name: Source(where, record) for name, record in manifest.sources.items()}
    for source in sources.values():
        source.verify()
    return sources


def manifest_digest(sources: dict[str, Source]) -> str:
    """Hex digest of what the manifest says about these sources."""
    return Manifest({name: source.record for name, source in sources.items()}).digest()
