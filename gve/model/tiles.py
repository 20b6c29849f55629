"""Contrast of B pairs with C columns of cosines, a tile of columns at a time: nothing of size B * C exists.

Backward computes every tile once more and adds to the gradients in place, where autograd with checkpoints would keep
several buffers of a tile and, for each tile, a gradient of all rows. Where the columns are the rows themselves (one
process), one product serves both directions: forward and backward take 4 matrix products, the full matrix 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class Columns:
    """Which of C columns count against which of B rows.

    Args:
        ceiling: [B], cosines of a row above it are false negatives; None: none are.
        own: [B, 4] int64: content ids of query and target, 1 when the pair could be read, number of the pair.
        ids: [C, 4] int64, as `own`.
        by_content: mask columns that share a content id with the row.
        width: columns of a tile.
        temperature: divides the cosines.
    """

    ceiling: torch.Tensor | None
    own: torch.Tensor
    ids: torch.Tensor
    by_content: bool
    width: int
    temperature: float

    def tiles(self) -> list[slice]:
        """The columns, so many at a time."""
        return [slice(begin, begin + self.width) for begin in range(0, len(self.ids), self.width)]

    def apart(self, tile: slice) -> torch.Tensor:
        """[B, w] bool: neither the row's own pair nor of equal content."""
        apart = self.own[:, None, 3] != self.ids[None, tile, 3]
        for side in (0, 1) if self.by_content else ():
            apart &= self.own[:, None, side] != self.ids[None, tile, side]
        return apart

    def counted(self, cosines: torch.Tensor, apart: torch.Tensor, tile: slice, *, flip: bool = False) -> torch.Tensor:
        """Cosines [B, w], -inf where a column does not count for its row; flipped, where a row does not for its column.

        The second is the other direction of the same product, where the columns are the rows.
        """
        counts = apart & (self.own[:, None, 2] if flip else self.ids[None, tile, 2]).bool()
        if self.ceiling is not None:
            counts &= cosines <= (self.ceiling[None, tile] if flip else self.ceiling[:, None])
        return cosines.masked_fill(counts.logical_not_(), -torch.inf)


class TiledContrast(torch.autograd.Function):
    """(query [B, D], target [B, D], queries [C, D] or None, targets [C, D] or None, Columns) -> five [B].

    Without the columns of other ranks the rows are the columns. The results: logsumexp of the query's logits and of the
    target's; then without gradient the largest, the sum and the number of the query's cosines that count.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        target: torch.Tensor,
        queries: torch.Tensor | None,
        targets: torch.Tensor | None,
        columns: Columns,
    ) -> tuple[torch.Tensor, ...]:
        floor = query.new_full((len(query),), -torch.inf)
        forward, backward, largest = floor, floor, floor
        total, count = torch.zeros_like(floor), torch.zeros_like(floor, dtype=torch.int64)
        own_columns = []
        with exact_float32(query.device.type):
            for tile in columns.tiles():
                apart = columns.apart(tile)
                cosines = query @ (target if targets is None else targets)[tile].T
                seen = columns.counted(cosines, apart, tile)
                counts = seen > -torch.inf
                largest = torch.maximum(largest, seen.amax(1))
                total = total + torch.where(counts, seen, 0).sum(1)
                count = count + counts.sum(1)
                forward = torch.logaddexp(forward, seen.div_(columns.temperature).logsumexp(1))
                if queries is None:
                    flipped = columns.counted(cosines, apart, tile, flip=True)
                    own_columns.append(flipped.div_(columns.temperature).logsumexp(0))
                else:
                    seen = columns.counted(target @ queries[tile].T, apart, tile)
                    backward = torch.logaddexp(backward, seen.div_(columns.temperature).logsumexp(1))
        if queries is None:
            backward = torch.cat(own_columns)
        ctx.columns = columns
        ctx.save_for_backward(query, target, queries, targets, forward, backward)
        ctx.mark_non_differentiable(largest, total, count)
        return forward, backward, largest, total, count

    @staticmethod
    def backward(
        ctx: Any, towards_forward: torch.Tensor, towards_backward: torch.Tensor, *_: Any
    ) -> tuple[torch.Tensor | None, ...]:
        query, target, queries, targets, forward, backward = ctx.saved_tensors
        columns: Columns = ctx.columns
        query_grad, target_grad = torch.zeros_like(query), torch.zeros_like(target)
        queries_grad, targets_grad = (None if rows is None else torch.zeros_like(rows) for rows in (queries, targets))
        temperature = columns.temperature
        with exact_float32(query.device.type):
            for tile in columns.tiles():
                apart = columns.apart(tile)
                others = (target if targets is None else targets)[tile]
                cosines = query @ others.T
                slope = _slope(columns.counted(cosines, apart, tile), temperature, forward, towards_forward, 1)
                if queries is None:
                    cosines = columns.counted(cosines, apart, tile, flip=True)
                    slope += _slope(cosines, temperature, backward[tile], towards_backward[tile], 0)
                query_grad.addmm_(slope, others)
                (target_grad if targets_grad is None else targets_grad)[tile].addmm_(slope.T, query)
                if queries_grad is not None:
                    cosines = columns.counted(target @ queries[tile].T, apart, tile)
                    slope = _slope(cosines, temperature, backward, towards_backward, 1)
                    target_grad.addmm_(slope, queries[tile])
                    queries_grad[tile].addmm_(slope.T, target)
        return query_grad, target_grad, queries_grad, targets_grad, None


def _slope(
    cosines: torch.Tensor, temperature: float, logsumexp: torch.Tensor, towards: torch.Tensor, dim: int
) -> torch.Tensor:
    """Gradient of a logsumexp over `dim` of cosines / temperature towards the cosines, in their place."""
    # Where nothing counts the sum is -inf, and so are all logits: their gradient is 0.
    level = logsumexp.nan_to_num(neginf=0.0).unsqueeze(dim)
    return cosines.div_(temperature).sub_(level).exp_().mul_(towards.unsqueeze(dim) / temperature)


@contextmanager
def exact_float32(device_type: str) -> Iterator[None]:
    """No autocast and no TF32: bfloat16 cosines step by 0.004 near 0.9, at temperature 0.03 an eighth of a logit."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
