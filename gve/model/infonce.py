"""The loss of GVE (arXiv 2510.27571, eq. 1): symmetric InfoNCE over every pair of every rank, with hard negatives.

Every rank holds the rows of its own B pairs and contrasts them with the columns of all W * B pairs. The gather carries
the gradient back, so W ranks compute exactly what one process would on the whole batch: a gather without gradient
halves the gradient on two ranks and turns it by 15 degrees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from gve.items import InputError
from gve.model.clock import CLOCK
from gve.model.tiles import Columns, TiledContrast, exact_float32


@dataclass(frozen=True)
class Contrast:
    """How the rows of a batch are contrasted.

    Args:
        temperature: divides the cosines.
        false_negative_margin: masks negatives whose cosine is above the positive's by more than this; None: off.
        tile: columns of cosines that exist at a time; each tile is computed again in backward, so memory is
            B * tile instead of B * W * B values, for one more matrix product of three (gve.model.tiles). 0: all at
            once.
        symmetric: the loss of a pair is the mean of both directions (paper eq. 1); False: query to target alone.
    """

    temperature: float = 0.03
    false_negative_margin: float | None = None
    tile: int = 0
    symmetric: bool = True

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise InputError(f"temperature {self.temperature} must be > 0 (the paper's is 0.03)")
        if self.tile < 0:
            raise InputError(f"loss_tile {self.tile} must be >= 0 (0: no tiles)")


_CONTRAST = Contrast()


@dataclass(frozen=True, eq=False)
class HardNegatives:
    """The hard negatives of B pairs, ragged.

    Args:
        embeddings: [M, D] unit rows, flat over all pairs.
        index: [B, N] int64, rows of `embeddings` that belong to each pair, -1 where a pair has fewer than N.
        content_ids: [M] int64, equal where the content is equal; None when unknown.
        valid: [M] bool, False on rows that could not be read; None when all are.
    """

    embeddings: torch.Tensor
    index: torch.Tensor
    content_ids: torch.Tensor | None = None
    valid: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class InfoNCE:
    """The loss and what is watched during training. All but `loss` are detached, and equal on every rank.

    Args:
        loss: scalar to call backward on. It is this rank's share times W, so that the mean over ranks (what DDP does
            with gradients) is the loss over the whole batch.
        mean_loss: the loss over the valid pairs of all ranks.
        mean_relevance: mean cosine of the queries with all targets that count.
        mean_positive: mean cosine of the pairs.
        max_negative_gap: mean over the queries of the positive's cosine minus the largest negative's (in-batch or
            hard); nan when no query has a negative.
        accuracy: share of the queries whose positive beats every negative; nan when no query has a negative.
    """

    loss: torch.Tensor
    mean_loss: torch.Tensor
    mean_relevance: torch.Tensor
    mean_positive: torch.Tensor
    max_negative_gap: torch.Tensor
    accuracy: torch.Tensor


def info_nce(
    query: torch.Tensor,
    target: torch.Tensor,
    contrast: Contrast = _CONTRAST,
    *,
    negatives: HardNegatives | None = None,
    content_ids: tuple[torch.Tensor, torch.Tensor] | None = None,
    valid: torch.Tensor | None = None,
    gather: bool = True,
) -> InfoNCE:
    """InfoNCE of paper eq. 1, in float32 whatever the autocast state (in float64 for float64 rows).

    Query i contrasts its target with the other targets of all ranks and with its own hard negatives; target i
    contrasts its query with the other queries. L_i is the mean of the two (without `contrast.symmetric` the first
    alone), the loss the mean over all valid pairs.

    Args:
        query: [B, D] unit rows. B must be equal on all ranks.
        target: [B, D] unit rows; row i is the positive of query i.
        contrast: temperature, margin, tiles, both directions or one.
        negatives: hard negatives; they enter only the query's side, and only in their own row.
        content_ids: ([B], [B]) int64 of the queries and the targets. Another pair with an equal query or an equal
            target is a false negative and is masked, also across ranks; so is a hard negative equal to the positive.
        valid: [B] bool, False on pairs that could not be read: no row and no column of theirs counts.
        gather: contrast with the pairs of all ranks; without a process group this changes nothing.
    """
    with CLOCK.phase("loss"), exact_float32(query.device.type):
        query, target = (rows.to(torch.promote_types(rows.dtype, torch.float32)) for rows in (query, target))
        world, rank = (dist.get_world_size(), dist.get_rank()) if gather and _distributed() else (1, 0)
        if valid is None:
            valid = torch.ones(len(query), dtype=torch.bool, device=query.device)
        own = torch.stack([*(content_ids or (valid, valid)), valid], 1).long()
        columns, column_ids = torch.cat([query, target], 1), own
        if world > 1:
            columns, column_ids = _GatherWithGradient.apply(columns), _all_gather(own)
        positive = (query * target).sum(1)
        ceiling = torch.full_like(positive, torch.inf)
        if contrast.false_negative_margin is not None:
            ceiling = positive.detach() + contrast.false_negative_margin
        hard = _hard_cosines(query, negatives, None if content_ids is None else content_ids[1], ceiling)

        temperature = contrast.temperature
        number = torch.arange(len(column_ids), device=query.device)
        first = rank * len(query)
        own = torch.cat([own, number[first : first + len(query), None]], 1)
        column_ids = torch.cat([column_ids, number[:, None]], 1)
        if 0 < contrast.tile < len(column_ids):
            others = (None, None) if world == 1 else columns.chunk(2, 1)
            limit = None if contrast.false_negative_margin is None else ceiling
            settings = Columns(limit, own, column_ids, content_ids is not None, contrast.tile, temperature)
            parts = TiledContrast.apply(query, target, *others, settings)
        else:
            parts = _against(
                *(query, target, ceiling, own, columns, column_ids),
                temperature=temperature,
                by_content=content_ids is not None,
            )
        forward, backward, largest, total, count = (each[:, None] for each in parts)

        own_logit = positive[:, None] / temperature
        query_loss = torch.cat([own_logit, forward, hard / temperature], 1).logsumexp(1) - own_logit[:, 0]
        target_loss = torch.cat([own_logit, backward], 1).logsumexp(1) - own_logit[:, 0]
        each = (query_loss + target_loss) / 2 if contrast.symmetric else query_loss
        loss_sum = torch.where(valid, each, 0).sum()
        positive, largest = positive.detach(), torch.cat([largest, hard.detach()], 1).amax(1)
        relevance = torch.stack([positive + total.sum(1), 1 + count.sum(1)], 1)
        return _report(loss_sum, positive, largest, relevance, valid, world)


def _against(
    query: torch.Tensor,
    target: torch.Tensor,
    ceiling: torch.Tensor,
    own: torch.Tensor,
    columns: torch.Tensor,
    column_ids: torch.Tensor,
    *,
    temperature: float,
    by_content: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """B pairs against the other pairs among C columns; the own pair is left out.

    Args:
        query, target: [B, D].
        ceiling: [B], cosines above are false negatives.
        own: [B, 4] int64: content ids of query and target, 1 when the pair could be read, number of the pair.
        columns: [C, 2 D], queries and targets side by side.
        column_ids: [C, 4] int64, as `own`.
        by_content: mask columns that share a content id with the row.

    Returns:
        Five [B]: logsumexp of the query's logits and of the target's; then without gradient the largest, the sum and
        the number of the query's cosines that count.
    """
    all_queries, all_targets = columns.chunk(2, 1)
    cosines, reverse = query @ all_targets.T, target @ all_queries.T
    others = column_ids[:, 2].bool() & (own[:, None, 3] != column_ids[None, :, 3])
    if by_content:
        others = others & ~(own[:, None, :2] == column_ids[None, :, :2]).any(-1)
    cosines = cosines.masked_fill(~(others & (cosines <= ceiling[:, None])), -torch.inf)
    reverse = reverse.masked_fill(~(others & (reverse <= ceiling[:, None])), -torch.inf)
    seen = cosines.detach()
    counts = seen.isfinite()
    return (
        (cosines / temperature).logsumexp(1),
        (reverse / temperature).logsumexp(1),
        seen.amax(1),
        torch.where(counts, seen, 0).sum(1),
        counts.sum(1),
    )


def _hard_cosines(
    query: torch.Tensor, negatives: HardNegatives | None, positive_ids: torch.Tensor | None, ceiling: torch.Tensor
) -> torch.Tensor:
    """Cosines [B, N] of each query with its own hard negatives, -inf on those that do not count."""
    if negatives is None:
        return query.new_empty(len(query), 0)
    index = negatives.index.clamp(min=0)
    counts = negatives.index >= 0
    if negatives.valid is not None:
        counts = counts & negatives.valid[index]
    if negatives.content_ids is not None and positive_ids is not None:
        counts = counts & (negatives.content_ids[index] != positive_ids[:, None])
    cosines = torch.einsum("bd,bnd->bn", query, negatives.embeddings.to(query.dtype)[index])
    return cosines.masked_fill(~(counts & (cosines <= ceiling[:, None])), -torch.inf)


def _report(
    loss_sum: torch.Tensor,
    positive: torch.Tensor,
    largest: torch.Tensor,
    relevance: torch.Tensor,
    valid: torch.Tensor,
    world: int,
) -> InfoNCE:
    """Scales the loss and reduces what is watched over the ranks, in one collective.

    Args:
        loss_sum: scalar, over this rank's valid pairs.
        positive: [B] cosines of the pairs.
        largest: [B] largest cosine of a negative, -inf where there is none.
        relevance: [B, 2], sum and number of the cosines that count in a row, the positive's too.
        valid: [B] bool.
        world: W.
    """
    gap = positive - largest
    contrasted = valid & gap.isfinite()
    sums = torch.stack(
        [
            loss_sum.detach(),
            valid.sum(),
            *torch.where(valid[:, None], relevance, 0).sum(0),
            torch.where(valid, positive, 0).sum(),
            torch.where(contrasted, gap, 0).sum(),
            (contrasted & (gap > 0)).sum(),
            contrasted.sum(),
        ]
    ).double()
    if world > 1:
        with CLOCK.phase("comm"):
            dist.all_reduce(sums)
    total, num_pairs, cosines, num_cosines, positives, gaps, correct, num_contrasted = sums.unbind()
    num_pairs = num_pairs.clamp(min=1)
    dtype = loss_sum.dtype
    return InfoNCE(
        loss=loss_sum * (world / num_pairs).to(dtype),
        mean_loss=(total / num_pairs).to(dtype),
        mean_relevance=(cosines / num_cosines.clamp(min=1)).to(dtype),
        mean_positive=(positives / num_pairs).to(dtype),
        max_negative_gap=(gaps / num_contrasted).to(dtype),
        accuracy=(correct / num_contrasted).to(dtype),
    )


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _all_gather(rows: torch.Tensor) -> torch.Tensor:
    gathered = rows.new_empty(dist.get_world_size() * rows.shape[0], *rows.shape[1:])
    with CLOCK.phase("comm"):
        dist.all_gather_single(gathered, rows.contiguous())
    return gathered


class _GatherWithGradient(torch.autograd.Function):
    """Rows of all ranks, [B, D] -> [W * B, D] in rank order; backward sums every rank's gradient of the own rows."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        return _all_gather(rows)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        own = gradient.new_empty(gradient.shape[0] // dist.get_world_size(), *gradient.shape[1:])
        with CLOCK.phase("comm"):
            dist.reduce_scatter_single(own, gradient.contiguous())
        return own
