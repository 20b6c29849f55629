"""Vectors kept by content, and the encoding of a list of items on all ranks, each distinct content once."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from gve.encode.encoder import Encoded, Encoder, Transform, item_key
from gve.encode.hashes import FileHashes
from gve.encode.ranks import gather_rows, union, world
from gve.items import Image, InputError, Item, Video

_log = logging.getLogger(__name__)

# Distinct items that one call of an encoder gets, at most: what an interruption costs a rank. It holds several batches
# of clips, so that decode workers do not run dry; a small job is cut finer, so that up to eight ranks have work.
PART, _LEAST_PARTS, _SMALLEST_PART = 256, 8, 4


class EmbeddingStore:
    """Vectors of one encoder, by what was encoded.

    On disk it is a folder per fingerprint of safetensors parts, each written under another name and renamed: a reader
    meets whole parts only, and interrupted work goes on where it stopped.

    Args:
        folder: where parts are kept; None keeps them in memory alone.
        fingerprint: of the encoder; other weights or another input policy never meet these vectors.

    Raises:
        InputError: a part cannot be read.
    """

    def __init__(self, folder: str | Path | None, fingerprint: str) -> None:
        self.folder = None if folder is None else Path(folder) / fingerprint[:16]
        self.added = 0  # vectors that this object was given: what was encoded, not found
        self._vectors: dict[str, np.ndarray] = {}
        for path in sorted(self.folder.glob("*.safetensors")) if self.folder else []:
            try:
                part = load_file(path)
            except (SafetensorError, OSError) as error:
                raise InputError(f"embedding store part {path} is damaged ({error}); delete it") from None
            self._vectors |= {bytes(key).hex(): row for key, row in zip(part["keys"], part["vectors"], strict=True)}

    def __len__(self) -> int:
        return len(self._vectors)

    def __contains__(self, key: str) -> bool:
        return key in self._vectors

    def __getitem__(self, key: str) -> np.ndarray:
        return self._vectors[key]

    def adopt(self, other: EmbeddingStore, items: Sequence[Item], *, write: bool = True) -> None:
        """Takes what another store has of the items, as found and not encoded: vectors that must be equal in both.

        Args:
            other: of the same weights under other frames, say, where the items are texts.
            write: as in `add`.
        """
        names: dict[str, None] = {}
        for item in items:
            with suppress(OSError):  # a missing file has no vector; who is to encode it names it
                names[item_key(item)] = None
        keys = [key for key in names if key in other and key not in self]
        if keys:
            before = self.added
            self.add(keys, np.stack([other[key] for key in keys]), write=write)
            self.added = before

    def add(self, keys: Sequence[str], vectors: np.ndarray | Sequence[np.ndarray], *, write: bool = True) -> None:
        """Keeps [N, D] vectors; in the folder too, if there is one and this process is to write."""
        self._vectors |= dict(zip(keys, vectors, strict=True))
        self.added += len(keys)
        if self.folder is None or not write or not len(keys):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{hashlib.sha256(''.join(keys).encode()).hexdigest()[:16]}.safetensors"
        draft = path.with_suffix(f".{os.getpid()}.tmp")  # another run may be writing the same part
        words = np.frombuffer(bytes.fromhex("".join(keys)), np.uint8).reshape(len(keys), -1)
        save_file({"keys": words.copy(), "vectors": np.ascontiguousarray(vectors)}, draft)
        os.replace(draft, path)


def encode_items(
    encoder: Encoder,
    items: Sequence[Item],
    store: EmbeddingStore,
    *,
    transform: Transform | None = None,
    progress: str = "",
    hashable: Sequence[Item] | None = None,
) -> Encoded:
    """Vectors of the items, from the store where it has them; a collective where ranks exist.

    Each distinct (content, instruction) is encoded once in the world, ranks share the work, and all of them hold the
    whole result. Items that `transform` does not touch have their plain vector.

    A vector's last bits depend on what shares its batch. Therefore the distinct contents are put in an order of their
    own (media first, then long texts) and cut into parts, and a part goes to one call of the encoder: neither the order
    of the items, nor the number of ranks, nor an interruption between two parts changes a bit.

    Args:
        items: a sequence that reads its items when they are asked for is asked on each rank for its share alone.
        store: of `encoder.fingerprint`; it takes what is new. Unreadable items are not kept, so they are tried again.
        hashable: the same items in a form that is cheap to hash (known content hashes, no pixels); only what the store
            lacks is then taken from `items`.

    Returns:
        One row per item, on every rank. An item for which the encoder gave a vector that is not finite is a failure.

    Raises:
        RuntimeError: the encoder lost an item.
    """
    rank, size = world()
    hashed = _hashed(hashable or items, transform, FileHashes(store.folder.parent if store.folder else None))
    first: dict[str, int] = {}
    for row in range(len(items)):
        if hashed[row].key:
            first.setdefault(hashed[row].key, row)
    lacking = union({key: "" for key in first if key not in store})
    order = sorted(first, key=lambda key: (hashed[first[key]].cost, key))
    step = min(PART, max(_SMALLEST_PART, -(-len(order) // _LEAST_PARTS)))
    parts = [order[start : start + step] for start in range(0, len(order), step)]
    wanted = [kept for part in parts if (kept := [key for key in part if key in lacking])]
    reasons: dict[str, str] = {}
    start, done = time.monotonic(), 0
    for turn in range(0, len(wanted), size):
        shares = wanted[turn : turn + size]
        own = shares[rank] if rank < len(shares) else []
        title = _title(progress, done, len(lacking), time.monotonic() - start) if rank == 0 else ""
        if title:
            _log.info(title)
        result = Encoded(np.empty((0, encoder.dim), np.float32))
        if own:
            result = encoder.encode([items[first[key]] for key in own], transform=transform, progress=title)
        if result.vectors.shape != (len(own), encoder.dim):
            raise RuntimeError(f"the encoder gave {result.vectors.shape} for {len(own)} items of {encoder.dim}")
        failures = dict(result.failures)
        for row in np.flatnonzero(~np.isfinite(result.vectors).all(1)).tolist():
            failures.setdefault(row, "the model gave a vector that is not finite")
        failed = union({own[row]: reason for row, reason in failures.items()})
        vectors = gather_rows(result.vectors)
        keys = [key for share in shares for key in share]
        good = [row for row, key in enumerate(keys) if key not in failed]
        store.add([keys[row] for row in good], vectors[good], write=rank == 0)
        reasons |= failed
        done += len(keys)
    vectors = np.full((len(items), encoder.dim), np.nan, np.float32)
    unread: dict[int, str] = {}
    for row in range(len(items)):
        key = hashed[row].key
        if key in store:
            vectors[row] = store[key]
        else:
            unread[row] = hashed[row].reason or reasons[key]
    return Encoded(vectors, unread)


class _Hashed(NamedTuple):
    """What an item is known by before it is opened.

    Args:
        key: of what is encoded; empty where a file cannot be read.
        cost: falls with the work it is, so far as that is known. Sorted by it, parts hold like items, the costliest
            first: ranks end together, and memory shows its peak at once.
        reason: why there is no key.
    """

    key: str
    cost: tuple[int, int, int] = (0, 0, 0)
    reason: str = ""


def _hashed(items: Sequence[Item], transform: Transform | None, files: FileHashes) -> dict[int, _Hashed]:
    """Row -> what it is known by, on every rank; each item is asked for once, and every new file read once."""
    rank, size = world()
    hashed: dict[int, _Hashed] = {}
    for row in range(rank, len(items), size):
        try:
            item = items[row]
            unread = files.recall(item)
            hashed[row] = _Hashed(_key(item, transform), _cost(item))
            files.keep(unread)
        except OSError as error:
            hashed[row] = _Hashed("", reason=f"missing: {error.filename} ({error.strerror})")
        except InputError as error:
            hashed[row] = _Hashed("", reason=str(error))
    files.write()
    if size > 1:
        everything: list[dict[int, _Hashed]] = [{} for _ in range(size)]
        dist.all_gather_object(everything, hashed)
        hashed = {row: value for part in everything for row, value in part.items()}
    return hashed


def _key(item: Item, transform: Transform | None) -> str:
    """What the vector depends on beside the encoder: item_key, and the transform where it changes the item."""
    if transform is None or not transform.touches(item):
        return item_key(item)
    return hashlib.sha256(f"{transform.name}\0{item_key(item)}".encode()).hexdigest()


def _cost(item: Item) -> tuple[int, int, int]:
    videos = sum(isinstance(part, Video) for part in item.parts)
    return -videos, -sum(isinstance(part, Image) for part in item.parts), -len(item.text)


def _title(progress: str, done: int, total: int, seconds: float) -> str:
    """The title of a part's bar: how far the whole is, and how long the rest will take at this pace."""
    if not progress or not done:
        return progress
    left = round(seconds / done * (total - done))
    return f"{progress}, {done} of {total}, {left // 3600}:{left % 3600 // 60:02}:{left % 60:02} left"
