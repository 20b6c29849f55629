"""The manifest of a shard folder: an explicit list of sources and their shards, in `manifest.json`.

Nothing is ever found by listing a folder: what the manifest does not name does not exist for training.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gve.data.schema import SCHEMA, ShardError
from gve.video import Sampling

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Presample:
    """How the videos of a source were reduced to stored frames.

    Args:
        sampling: which frames are kept.
        max_frame_px: frames of more pixels (height x width) were scaled down to it; 0 keeps the size.
        jpeg_quality: of the stored frames, 1 to 100.
    """

    sampling: Sampling
    max_frame_px: int = 0
    jpeg_quality: int = 95

    def __post_init__(self) -> None:
        if self.max_frame_px < 0 or not 1 <= self.jpeg_quality <= 100:
            raise ShardError(
                f"presample of {self.max_frame_px} px at JPEG quality {self.jpeg_quality}: "
                "use 0 or more pixels and a quality of 1 to 100"
            )

    def serves(self, sampling: Sampling, frame_px: int) -> bool:
        """Whether a run that samples like this can use the stored frames.

        The same policy, or fewer frames of a uniform one: then the stored frames nearest to the wanted ones are taken.
        """
        same = sampling == self.sampling
        fewer = sampling.kind == self.sampling.kind == "uniform" and sampling.num_frames <= self.sampling.num_frames
        return (same or fewer) and (self.max_frame_px == 0 or frame_px <= self.max_frame_px)


@dataclass(frozen=True)
class ShardRecord:
    """One tar of the manifest.

    Args:
        file: path relative to the shard folder, with forward slashes.
        count: samples in it.
        bytes: its size.
        sha256: of the whole file.
    """

    file: str
    count: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class SourceRecord:
    """One source of the manifest.

    Args:
        name: unique in the folder; the keys of its samples start with it.
        task: modality task, for example "T2V".
        level: pyramid level, 1 to 3.
        instruction: the query instruction of samples that have none of their own.
        index: combined index file, relative to the folder.
        index_sha256: of that file.
        presample: policy of the stored frames; None where the videos are original files.
        shards: its tars, in row order.
    """

    name: str
    task: str
    level: int
    instruction: str
    index: str
    index_sha256: str
    presample: Presample | None
    shards: tuple[ShardRecord, ...]

    @property
    def count(self) -> int:
        return sum(shard.count for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SourceRecord:
        presample = values["presample"]
        if presample is not None:
            presample = Presample(**{**presample, "sampling": Sampling(**presample["sampling"])})
        shards = tuple(ShardRecord(**shard) for shard in values["shards"])
        return cls(**{**values, "presample": presample, "shards": shards})


@dataclass(frozen=True)
class Manifest:
    """All sources of a shard folder, by name, in the order of their names."""

    sources: dict[str, SourceRecord]

    @classmethod
    def parse(cls, data: bytes, name: str) -> Manifest:
        """Reads a manifest.

        Args:
            data: content of the file.
            name: what to call it in messages.

        Raises:
            ShardError: it is damaged, of another schema version, or empty.
        """
        try:
            values = json.loads(data)
            if values["schema"] != SCHEMA:
                raise ShardError(
                    f"{name} has schema version {values['schema']!r}, this code reads {SCHEMA}: rebuild the shards"
                )
            records = [SourceRecord.from_dict(source) for source in values["sources"]]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, ShardError):
                raise
            raise ShardError(f"{name} is no shard manifest ({error!r}): rebuild the shards") from error
        return cls({record.name: record for record in sorted(records, key=lambda record: record.name)})

    @classmethod
    def load(cls, root: Path) -> Manifest:
        """The manifest of a local folder; an absent one has no sources."""
        path = root / MANIFEST
        return cls.parse(path.read_bytes(), str(path)) if path.exists() else cls({})

    def to_bytes(self) -> bytes:
        sources = [asdict(self.sources[name]) for name in sorted(self.sources)]
        return (json.dumps({"schema": SCHEMA, "sources": sources}, indent=1, sort_keys=True) + "\n").encode()

    def digest(self) -> str:
        """Hex SHA-256 (first 16 digits): equal manifests plan equal rows."""
        return hashlib.sha256(self.to_bytes()).hexdigest()[:16]


@contextmanager
def edit_manifest(root: Path) -> Iterator[dict[str, SourceRecord]]:
    """Changes the sources of a folder: yields them, and writes the result in one rename when the block ends well.

    Writers of several processes take turns by a lock file, so none loses the source of another.
    """
    with open(root / ".manifest.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sources = dict(Manifest.load(root).sources)
        yield sources
        write_atomically(root / MANIFEST, Manifest(sources).to_bytes())


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file under a temporary name, makes it durable, and renames it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
