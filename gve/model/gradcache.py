"""GradCache (arXiv 2101.06983) for video: the gradient of a batch far larger than memory, chunk by chunk.

The loss needs the embeddings of all rows at once, but not their activations. So a first pass embeds the chunks without
gradient, the loss gives the gradient of every embedding, and a second pass runs each chunk again and carries that
gradient into the weights. The dropout of the second pass is that of the first; the vision tower is frozen, so its
features serve both.

The gradients are collected beside the parameters' `grad` and handed over by the backward of the loss that is returned.
To whoever calls it this is one ordinary backward: DDP reduces once a step whatever the number of chunks, and gradient
clipping, schedulers and checkpoints do not know of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from gve.items import EmbedBatch
from gve.model.clock import CLOCK
from gve.model.infonce import InfoNCE


@dataclass(frozen=True, eq=False)
class Chunk:
    """Rows of one side of a training batch that are embedded together.

    Args:
        side: number of the side.
        rows: [b] int64, places of the rows in their side; empty for a chunk that only keeps the ranks together.
        batch: the rows, padded for themselves.
    """

    side: int
    rows: torch.Tensor
    batch: EmbedBatch


def grad_cache(
    embed: Callable[[EmbedBatch], torch.Tensor],
    sides: Sequence[EmbedBatch],
    loss: Callable[..., InfoNCE],
    parameters: Sequence[torch.Tensor],
    *,
    max_tokens: int,
    seed: int,
) -> InfoNCE:
    """The loss of a batch and its exact gradient, with the activations of one chunk in memory at a time.

    Args:
        embed: batch -> [b, D]; it must have the features of the pictures already, patches are not handed on.
        sides: batches whose embeddings the loss needs.
        loss: called with one [B, D] for each side.
        parameters: what trains.
        max_tokens: of a chunk, padding included; a longer row is a chunk of its own.
        seed: dropout of chunk i is drawn from `seed + i`, in both passes.

    Returns:
        What `loss` returned; backward on its `loss` gives each parameter its gradient.
    """
    chunks = same_count_on_all_ranks(chunks_of(sides, max_tokens))
    pieces: list[list[torch.Tensor]] = [[] for _ in sides]
    with torch.no_grad():
        for number, chunk in enumerate(chunks):
            torch.manual_seed(seed + number)
            pieces[chunk.side].append(embed(chunk.batch)[: len(chunk.rows)])
    order = [torch.cat([chunk.rows for chunk in chunks if chunk.side == side]).argsort() for side in range(len(sides))]
    embeddings = [torch.cat(parts)[place].requires_grad_() for parts, place in zip(pieces, order, strict=True)]
    result = loss(*embeddings)
    towards = torch.autograd.grad(result.loss, embeddings, materialize_grads=True)

    totals = [torch.zeros_like(parameter) for parameter in parameters]
    for number, chunk in enumerate(chunks):
        torch.manual_seed(seed + number)
        rows = embed(chunk.batch)
        gradient = torch.zeros_like(rows)
        gradient[: len(chunk.rows)] = towards[chunk.side][chunk.rows]
        with CLOCK.phase("decoder"):
            parts = torch.autograd.grad(rows, parameters, gradient, materialize_grads=True)
        for total, part in zip(totals, parts, strict=True):
            total += part
    return replace(result, loss=_HandOver.apply(result.loss.detach(), totals, *parameters))


def chunks_of(sides: Sequence[EmbedBatch], max_tokens: int) -> list[Chunk]:
    """Cuts every side into chunks of rows of like length, the longest first: what does not fit fails at once."""

    def fits(side: int, rows: int, longest: int, tokens: int) -> bool:
        return rows * longest <= max_tokens

    return _cut(sides, fits)


def groups_of(sides: Sequence[EmbedBatch], padding: float) -> list[Chunk]:
    """Cuts every side into groups of rows of like length: as few as keep the padding of each at a share of the side.

    Args:
        sides: batches whose pictures have been seen.
        padding: of a group, as a share of the tokens of its side.
    """
    room = [padding * float(side.attention_mask.sum()) for side in sides]

    def fits(side: int, rows: int, longest: int, tokens: int) -> bool:
        return rows * longest - tokens <= room[side]

    return _cut(sides, fits)


def _cut(sides: Sequence[EmbedBatch], fits: Callable[[int, int, int, int], bool]) -> list[Chunk]:
    """Groups of rows of each side by falling length; a row that no longer fits, or fits nowhere, begins a group.

    Args:
        sides: batches.
        fits: whether so many rows of (side, rows, longest, tokens in all) may run together.
    """
    chunks = []
    for number, side in enumerate(sides):
        # The tower's features are at hand; the patches, by far the most of a batch, need not be cut up.
        side = replace(side, image_patches=None, video_patches=None)
        lengths = side.attention_mask.sum(1).tolist()
        groups: list[list[int]] = []
        tokens = 0  # of the last group
        for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
            tokens += lengths[row]
            if groups and fits(number, len(groups[-1]) + 1, lengths[groups[-1][0]], tokens):
                groups[-1].append(row)
            else:
                groups.append([row])
                tokens = lengths[row]
        device = side.input_ids.device
        chunks += [Chunk(number, torch.tensor(group, device=device), take(side, group)) for group in groups]
    return chunks


def embed_groups(embed: Callable[[EmbedBatch], torch.Tensor], groups: Sequence[Chunk]) -> list[torch.Tensor]:
    """Embeds all rows with their graph, group by group: one [B, D] for each side, rows in order."""
    sides: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for group in groups:
        sides.setdefault(group.side, []).append((group.rows, embed(group.batch)))
    joined = [tuple(map(torch.cat, zip(*parts, strict=True))) for _, parts in sorted(sides.items())]
    return [rows[places.argsort()] for places, rows in joined]


def take(batch: EmbedBatch, rows: Sequence[int]) -> EmbedBatch:
    """The batch that these rows alone would have been collated to, bit for bit: padding of others is cut away.

    Args:
        batch: a batch with its pictures, or with their keys only.
        rows: of the batch, in any order.

    Raises:
        ValueError: the batch does not say which rows its pictures belong to.
    """
    index = torch.tensor(rows, device=batch.input_ids.device)
    used = batch.attention_mask[index].any(0).nonzero()
    first, last = int(used[0]), int(used[-1]) + 1
    pictures: dict[str, Any] = {}
    for kind in ("image", "video"):
        keys, owners = getattr(batch, f"{kind}_keys"), getattr(batch, f"{kind}_rows")
        if len(keys) != len(owners):
            raise ValueError(f"the batch has {len(keys)} {kind}s, and {kind}_rows names the rows of {len(owners)}")
        of_row: dict[int, list[int]] = {}
        for one, owner in enumerate(owners):
            of_row.setdefault(owner, []).append(one)
        chosen = [(place, one) for place, row in enumerate(rows) for one in of_row.get(row, ())]
        pictures[f"{kind}_keys"] = tuple(keys[one] for _, one in chosen)
        pictures[f"{kind}_rows"] = tuple(place for place, _ in chosen)
        grid, patches = getattr(batch, f"{kind}_grid"), getattr(batch, f"{kind}_patches")
        pieces = patches.split(grid.prod(-1).tolist()) if patches is not None else ()
        pictures[f"{kind}_grid"] = grid[[one for _, one in chosen]] if chosen else None
        pictures[f"{kind}_patches"] = torch.cat([pieces[one] for _, one in chosen]) if chosen and pieces else None
    return replace(
        batch,
        input_ids=batch.input_ids[index, first:last],
        attention_mask=batch.attention_mask[index, first:last],
        position_ids=batch.position_ids[:, index, first:last],
        pool_index=batch.pool_index[index] - first,
        content_ids=batch.content_ids[index],
        valid=batch.valid[index],
        **pictures,
    )


def same_count_on_all_ranks(chunks: list[Chunk]) -> list[Chunk]:
    """Fills up with chunks of no rows: where weights are sharded, every forward is a collective of all ranks.

    A filling chunk runs the shortest row again, and nothing of it is used.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return chunks
    shortest = min(chunks, key=lambda chunk: chunk.batch.input_ids.shape[1])
    most = torch.tensor(len(chunks), device=shortest.rows.device)
    with CLOCK.phase("comm"):
        dist.all_reduce(most, dist.ReduceOp.MAX)
    filling = Chunk(shortest.side, shortest.rows[:0], take(shortest.batch, [len(shortest.batch) - 1]))
    return chunks + [filling] * (int(most) - len(chunks))


class _HandOver(torch.autograd.Function):
    """A loss whose gradients are known already: backward gives each parameter its own, times what comes from above."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, gradients: list[torch.Tensor], *parameters: torch.Tensor) -> torch.Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (None, None, *(upstream * gradient for gradient in ctx.gradients))
