"""Items decoded, changed and prepared a few at a time in loader workers, for encoders with inputs of their own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from gve.encode.encoder import Rows, Transform, decoded
from gve.inputs import InputPolicy
from gve.items import InputError, Item, Video
from gve.video import Sampling

Prepared = TypeVar("Prepared")


@dataclass(frozen=True)
class Decoding(Generic[Prepared]):
    """How items become what a model is fed.

    Args:
        sampling: which frames of a clip are read.
        prepare: makes one decoded item ready; it runs in the workers, so it must pickle.
        batch_pictures: most frames and images of one group; a text counts as one. A clip of more frames is a group of
            its own.
        num_workers: loader processes; 0 decodes in the calling one.
    """

    sampling: Sampling
    prepare: Callable[[Item], Prepared]
    batch_pictures: int = 64
    num_workers: int = 0

    def __call__(
        self, items: Sequence[Item], transform: Transform | None = None
    ) -> Iterator[tuple[dict[int, Prepared], dict[int, str]]]:
        """Groups of items of like cost: row -> what `prepare` made, and row -> why an item could not be read.

        Every row comes once, in one of the two.
        """
        yield from DataLoader(
            _Groups(items, self.groups(items), self, transform),
            batch_size=None,
            num_workers=self.num_workers,
            generator=torch.Generator(),  # else each loader draws its workers' seed from the global generator
        )

    def groups(self, items: Sequence[Item]) -> list[Rows]:
        """Rows cut into groups: most pictures first, then longest texts first, so that a batch pads little."""

        def pictures(item: Item) -> int:
            return sum(self.sampling.num_frames if isinstance(part, Video) else 1 for part in item.media)

        costs = [(pictures(item), len(item.text)) for item in items]
        groups: list[Rows] = []
        room = 0
        for row in sorted(range(len(items)), key=lambda row: costs[row], reverse=True):
            cost = max(1, costs[row][0])
            if room < cost:
                groups.append([])
                room = max(cost, self.batch_pictures)
            groups[-1].append(row)
            room -= cost
        return groups


class _Groups(Dataset[tuple[dict[int, Any], dict[int, str]]]):
    def __init__(
        self, items: Sequence[Item], groups: Sequence[Rows], how: Decoding, transform: Transform | None
    ) -> None:
        self.items, self.groups, self.how, self.transform = items, groups, how, transform

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> tuple[dict[int, Any], dict[int, str]]:
        ready, failures = {}, {}
        for row in self.groups[index]:
            try:
                item = decoded(self.items[row], InputPolicy(sampling=self.how.sampling))
                if self.transform is not None and self.transform.touches(item):
                    item = self.transform(item)
                ready[row] = self.how.prepare(item)
            except InputError as error:
                failures[row] = str(error)
        return ready, failures


def weights_hash(model: torch.nn.Module) -> str:
    """Hex SHA-256 over the names, types and bytes of a model's tensors: one second a gigabyte."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fingerprint_of(weights_hash: str, inputs: Mapping[str, Any]) -> str:
    """Hex SHA-256 of weights and all that decides their inputs: vectors of equal ones may be compared and kept."""
    return hashlib.sha256(f"{weights_hash}\0{json.dumps(inputs, sort_keys=True)}".encode()).hexdigest()
