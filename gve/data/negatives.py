"""Mined hard negatives: one file beside the shards that refers to rows and copies nothing.

The file is safetensors. For every source that was mined it holds two tensors::

    <source>.places   [rows, N] int64, places in the source's corpus, nearest first; -1 where a row has fewer
    <source>.scores   [rows, N] float32, cosine of query and negative by the prober; -inf there

A corpus is a list of sources of a shard folder: place p counts through their rows in that order, and what is meant is
the target of that row. What the numbers belong to stands in the header (JSON in the metadata, and for people in
`<file>.json` beside it): prober, input policy, digest of the shards, parameters. A file that belongs to other shards is
refused, so a place never points at another row than the one that was scored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import save

from gve.data.manifest import write_atomically
from gve.data.schema import ShardError
from gve.data.sources import Source, manifest_digest, open_sources

VERSION = 1
NONE = -1
"""Place that stands for no negative."""


@dataclass(frozen=True)
class NegativesHeader:
    """What a file of mined negatives belongs to.

    Args:
        corpora: mined source -> the sources its places count through.
        manifest: digest of those sources and the mined ones.
        prober: fingerprint of the encoder that scored.
        policy: digest of its input policy.
        corpus_root: shard folder of the corpora where it is not the training one.
        corpus_manifest: digest of the corpora there.
        parameters: of the search, JSON-able.
    """

    corpora: dict[str, list[str]]
    manifest: str
    prober: str
    policy: str = ""
    corpus_root: str = ""
    corpus_manifest: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)


def write_negatives(path: Path, header: NegativesHeader, tables: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> str:
    """Writes the file in one rename, and its header as `<file>.json`.

    Args:
        path: of the file.
        header: what it belongs to.
        tables: mined source -> (places [rows, N] int64, scores [rows, N] float32).

    Returns:
        Its digest: equal digests mean equal negatives.
    """
    tensors: dict[str, np.ndarray] = {}
    for name, (places, scores) in tables.items():
        tensors[f"{name}.places"] = np.ascontiguousarray(places, np.int64)
        tensors[f"{name}.scores"] = np.ascontiguousarray(scores, np.float32)
    text = json.dumps({"version": VERSION, **asdict(header)}, sort_keys=True)
    data = save(tensors, {"header": text})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data)
    digest = hashlib.sha256(data).hexdigest()[:16]
    readable = json.dumps({**json.loads(text), "digest": digest}, indent=1, sort_keys=True)
    write_atomically(path.with_name(f"{path.name}.json"), f"{readable}\n".encode())
    return digest


def digest_of(path: Path) -> str:
    """Hex SHA-256 (first 16 digits) of a file of negatives.

    Raises:
        ShardError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        raise ShardError(
            f"mined negatives {path} cannot be read ({error.strerror}): make them with `gve mine`"
        ) from None


def read_header(path: Path) -> NegativesHeader:
    """The header of a file of negatives.

    Raises:
        ShardError: no such file, or another format.
    """
    try:
        with safetensors.safe_open(path, "np") as file:
            values = json.loads(file.metadata()["header"])
        if (version := values.pop("version")) != VERSION:
            raise ShardError(
                f"mined negatives {path} have version {version}, this code reads {VERSION}: mine them again"
            )
        return NegativesHeader(**values)
    except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        if isinstance(error, ShardError):
            raise
        raise ShardError(f"{path} holds no mined negatives ({error}): make it with `gve mine`") from error


class MinedNegatives:
    """Looks up which rows are the hard negatives of a row. Empty until `use`.

    Pickles small: a worker maps the file again.
    """

    def __init__(self) -> None:
        self.digest = ""
        """Of the file in use; empty without one."""
        self._path = Path()
        self._corpora: dict[str, list[Source]] = {}
        self._starts: dict[str, np.ndarray] = {}
        self._file: Any = None

    def use(self, path: Path, sources: Mapping[str, Source], digest: str = "") -> None:
        """Takes a file into use.

        Args:
            path: of the file.
            sources: all sources of the training's shard folder.
            digest: what the file's digest must be; any when empty.

        Raises:
            ShardError: it cannot be read, is another file, or belongs to other shards.
        """
        found = digest_of(path)
        if digest not in ("", found):
            raise ShardError(f"mined negatives {path} have digest {found}, the run goes on with {digest}")
        header = read_header(path)
        mined, listed = set(header.corpora), {name for corpus in header.corpora.values() for name in corpus}
        others = open_sources(header.corpus_root) if header.corpus_root else sources
        named = mined if header.corpus_root else mined | listed
        for wanted, there, expected in (
            (named, sources, header.manifest),
            (listed if header.corpus_root else set(), others, header.corpus_manifest),
        ):
            if wanted and (wanted - set(there) or digest_of_sources(there, wanted) != expected):
                raise ShardError(f"mined negatives {path} belong to other shards: mine them again with `gve mine`")
        self._path, self.digest = path, found
        self._file = safetensors.safe_open(path, "np")  # now: a file put in its place later is another one
        self._corpora = {name: [others[own] for own in corpus] for name, corpus in header.corpora.items()}
        self._starts = {
            name: np.concatenate(([0], np.cumsum([len(source) for source in corpus])))
            for name, corpus in self._corpora.items()
        }

    @property
    def corpora(self) -> list[Source]:
        """Every source that negatives are taken from."""
        return list({id(source): source for corpus in self._corpora.values() for source in corpus}.values())

    def __call__(self, source: str, row: int) -> list[tuple[Source, int]]:
        """(source, row) whose targets are the negatives of a row, nearest first; empty where none were mined."""
        if source not in self._corpora:
            return []
        if self._file is None:
            self._file = safetensors.safe_open(self._path, "np")
        places = self._file.get_slice(f"{source}.places")[row : row + 1][0]
        starts = self._starts[source]
        inside = np.searchsorted(starts, places, side="right") - 1
        return [
            (self._corpora[source][corpus], int(place - starts[corpus]))
            for place, corpus in zip(places.tolist(), inside.tolist(), strict=True)
            if place != NONE
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}


def digest_of_sources(sources: Mapping[str, Source], names: Sequence[str] | set[str]) -> str:
    """Digest of what the manifest says about some of the sources: adding others does not change it."""
    return manifest_digest({name: sources[name] for name in sorted(names)})
