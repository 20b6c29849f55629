"""Vectors kept by content, and the encoding of a list of items on all ranks, each distinct content once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from gve.encode.encoder import Encoded, Encoder, Transform, item_key
from gve.items import InputError, Item

PART = 2048  # distinct items between two writes of a store that is kept on disk: what an interruption costs


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

    def add(self, keys: Sequence[str], vectors: np.ndarray, *, write: bool = True) -> None:
        """Keeps [N, D] vectors; in the folder too, if there is one and this process is to write."""
        self._vectors |= dict(zip(keys, vectors, strict=True))
        if self.folder is None or not write or not len(keys):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{hashlib.sha256(''.join(keys).encode()).hexdigest()[:16]}.safetensors"
        draft = path.with_suffix(".tmp")
        words = np.frombuffer(bytes.fromhex("".join(keys)), np.uint8).reshape(len(keys), -1)
        save_file({"keys": words.copy(), "vectors": np.ascontiguousarray(vectors)}, draft)
        os.replace(draft, path)


def _world() -> tuple[int, int]:
    """(rank, number of ranks)."""
    ready = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if ready else (0, 1)


def _gather(rows: np.ndarray) -> np.ndarray:
    """[n, D] of rank r, which holds rows r::W of a whole, to the whole on every rank."""
    world = _world()[1]
    if world == 1:
        return rows
    counts: list[int] = [0] * world
    dist.all_gather_object(counts, len(rows))
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    padded = torch.zeros(max(counts), rows.shape[1], device=device)
    padded[: len(rows)] = torch.from_numpy(rows)
    shares = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(shares, padded)
    whole = np.empty((sum(counts), rows.shape[1]), np.float32)
    for other, share in enumerate(shares):
        whole[other::world] = share[: counts[other]].cpu().numpy()
    return whole


def _agree(values: dict[str, str]) -> dict[str, str]:
    """The union of the ranks' dictionaries, the same on all of them."""
    world = _world()[1]
    if world == 1:
        return values
    parts: list[dict[str, str]] = [{} for _ in range(world)]
    dist.all_gather_object(parts, values)
    return {key: value for part in parts for key, value in sorted(part.items())}


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

    Args:
        items: a sequence that reads its items when they are asked for is asked on each rank for its share alone.
        store: of `encoder.fingerprint`; it takes what is new. Unreadable items are not kept, so they are tried again.
        hashable: the same items in a form that is cheap to hash (known content hashes, no pixels); only what the store
            lacks is then taken from `items`.

    Returns:
        One row per item, on every rank.

    Raises:
        RuntimeError: the encoder lost an item or gave NaN without a reason.
    """
    rank, world = _world()
    hashed: dict[int, tuple[str, str]] = {}
    for row in range(rank, len(items), world):  # hashing reads every file: shared like the encoding
        try:
            hashed[row] = (_key((hashable or items)[row], transform), "")
        except OSError as error:
            hashed[row] = ("", f"missing: {error.filename} ({error.strerror})")
        except InputError as error:
            hashed[row] = ("", str(error))
    if world > 1:
        everything: list[dict[int, tuple[str, str]]] = [{} for _ in range(world)]
        dist.all_gather_object(everything, hashed)
        hashed = {row: value for part in everything for row, value in part.items()}
    first: dict[str, int] = {}
    for row in range(len(items)):
        if hashed[row][0]:
            first.setdefault(hashed[row][0], row)
    lacking = _agree({key: "" for key in first if key not in store})
    wanted = [key for key in first if key in lacking]
    reasons: dict[str, str] = {}
    step = PART * world if store.folder else max(1, len(wanted))
    for start in range(0, len(wanted), step):
        part = wanted[start : start + step]
        share = part[rank::world]
        result = encoder.encode(
            [items[first[key]] for key in share], transform=transform, progress=progress if rank == 0 else ""
        )
        if result.vectors.shape != (len(share), encoder.dim):
            raise RuntimeError(f"the encoder gave {result.vectors.shape} for {len(share)} items of {encoder.dim}")
        failed = _agree({share[row]: reason for row, reason in result.failures.items()})
        vectors = _gather(result.vectors)
        good = [row for row, key in enumerate(part) if key not in failed]
        if not np.isfinite(vectors[good]).all():
            raise RuntimeError("the encoder gave vectors that are not finite for items that it could read")
        store.add([part[row] for row in good], vectors[good], write=rank == 0)
        reasons |= failed
    vectors = np.full((len(items), encoder.dim), np.nan, np.float32)
    failures: dict[int, str] = {}
    for row in range(len(items)):
        key, reason = hashed[row]
        if key in store:
            vectors[row] = store[key]
        else:
            failures[row] = reason or reasons[key]
    return Encoded(vectors, failures)


def _key(item: Item, transform: Transform | None) -> str:
    """What the vector depends on beside the encoder: item_key, and the transform where it changes the item."""
    if transform is None or not transform.touches(item):
        return item_key(item)
    return hashlib.sha256(f"{transform.name}\0{item_key(item)}".encode()).hexdigest()
