"""The loss of GVE (arXiv 2510.27571, eq. 1): symmetric InfoNCE over every pair of every rank, with hard negatives.

Every rank holds the rows of its own B pairs and contrasts them with the columns of all W * B pairs. The gather carries
the gradient back, so W ranks compute exactly what one process would on the whole batch: a gather without gradient
halves the gradient on two ranks and turns it by 15 degrees.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


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
    *,
    temperature: float = 0.03,
    negatives: HardNegatives | None = None,
    content_ids: tuple[torch.Tensor, torch.Tensor] | None = None,
    valid: torch.Tensor | None = None,
    false_negative_margin: float | None = None,
    gather: bool = True,
) -> InfoNCE:
    """Symmetric InfoNCE of paper eq. 1, in float32 whatever the autocast state.

    Query i contrasts its target with the other targets of all ranks and with its own hard negatives; target i
    contrasts its query with the other queries. L_i is the mean of the two, the loss the mean over all valid pairs.

    Args:
        query: [B, D] unit rows. B must be equal on all ranks.
        target: [B, D] unit rows; row i is the positive of query i.
        temperature: divides the cosines.
        negatives: hard negatives; they enter only the query's side, and only in their own row.
        content_ids: ([B], [B]) int64 of the queries and the targets. Another pair with an equal query or an equal
            target is a false negative and is masked, also across ranks; so is a hard negative equal to the positive.
        valid: [B] bool, False on pairs that could not be read: no row and no column of theirs counts.
        false_negative_margin: masks negatives whose cosine is above the positive's by more than this; None: off.
        gather: contrast with the pairs of all ranks; without a process group this changes nothing.
    """
    with _exact_float32(query.device.type):
        query, target = query.float(), target.float()
        world, rank = (dist.get_world_size(), dist.get_rank()) if gather and _distributed() else (1, 0)
        all_queries, all_targets = query, target
        if world > 1:
            all_queries, all_targets = _GatherWithGradient.apply(torch.cat([query, target], 1)).chunk(2, 1)
        pairs = torch.zeros(len(query), len(all_queries), dtype=torch.bool, device=query.device)
        pairs.diagonal(rank * len(query)).fill_(True)
        if valid is None:
            valid = torch.ones(len(query), dtype=torch.bool, device=query.device)
        others = ~pairs & _may_contrast(content_ids, valid, world)

        cosines, reverse = query @ all_targets.T, target @ all_queries.T
        hard, hard_others = _hard_cosines(query, negatives, None if content_ids is None else content_ids[1])
        positive = cosines[pairs]
        ceiling = torch.inf if false_negative_margin is None else positive.detach()[:, None] + false_negative_margin
        cosines = cosines.masked_fill(~(pairs | (others & (cosines <= ceiling))), -torch.inf)
        reverse = reverse.masked_fill(~(pairs | (others & (reverse <= ceiling))), -torch.inf)
        hard = hard.masked_fill(~(hard_others & (hard <= ceiling)), -torch.inf)

        query_loss = (torch.cat([cosines, hard], 1) / temperature).logsumexp(1) - positive / temperature
        target_loss = (reverse / temperature).logsumexp(1) - positive / temperature
        loss_sum = torch.where(valid, (query_loss + target_loss) / 2, 0).sum()
        return _report(loss_sum, cosines.detach(), hard.detach(), pairs, valid, world)


def _may_contrast(
    content_ids: tuple[torch.Tensor, torch.Tensor] | None, valid: torch.Tensor, world: int
) -> torch.Tensor:
    """[B, W * B] bool: the column's pair could be read and shares no content with the row's pair."""
    own = torch.stack([*(content_ids or (valid, valid)), valid], 1).long()
    columns = _all_gather(own) if world > 1 else own
    readable = columns[:, 2].bool().expand(len(own), -1)
    if content_ids is None:
        return readable
    return readable & ~(own[:, None, :2] == columns[None, :, :2]).any(-1)


def _hard_cosines(
    query: torch.Tensor, negatives: HardNegatives | None, positive_ids: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines [B, N] of each query with its own hard negatives, and which of them count."""
    if negatives is None:
        return query.new_empty(len(query), 0), torch.empty(len(query), 0, dtype=torch.bool, device=query.device)
    index = negatives.index.clamp(min=0)
    counts = negatives.index >= 0
    if negatives.valid is not None:
        counts = counts & negatives.valid[index]
    if negatives.content_ids is not None and positive_ids is not None:
        counts = counts & (negatives.content_ids[index] != positive_ids[:, None])
    return torch.einsum("bd,bnd->bn", query, negatives.embeddings.float()[index]), counts


def _report(
    loss_sum: torch.Tensor,
    cosines: torch.Tensor,
    hard: torch.Tensor,
    pairs: torch.Tensor,
    valid: torch.Tensor,
    world: int,
) -> InfoNCE:
    """Scales the loss and reduces what is watched over the ranks, in one collective; masked cosines are -inf."""
    positive = cosines[pairs]
    gap = positive - torch.cat([cosines.masked_fill(pairs, -torch.inf), hard], 1).amax(1)
    contrasted = valid & gap.isfinite()
    seen = cosines.isfinite() & valid[:, None]
    sums = torch.stack(
        [
            loss_sum.detach(),
            valid.sum(),
            torch.where(seen, cosines, 0).sum(),
            seen.sum(),
            torch.where(valid, positive, 0).sum(),
            torch.where(contrasted, gap, 0).sum(),
            (contrasted & (gap > 0)).sum(),
            contrasted.sum(),
        ]
    ).double()
    if world > 1:
        dist.all_reduce(sums)
    total, num_pairs, relevance, num_seen, positives, gaps, correct, num_contrasted = sums.unbind()
    num_pairs = num_pairs.clamp(min=1)
    return InfoNCE(
        loss=loss_sum * (world / num_pairs).float(),
        mean_loss=(total / num_pairs).float(),
        mean_relevance=(relevance / num_seen.clamp(min=1)).float(),
        mean_positive=(positives / num_pairs).float(),
        max_negative_gap=(gaps / num_contrasted).float(),
        accuracy=(correct / num_contrasted).float(),
    )


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _all_gather(rows: torch.Tensor) -> torch.Tensor:
    gathered = rows.new_empty(dist.get_world_size() * rows.shape[0], *rows.shape[1:])
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
        dist.reduce_scatter_single(own, gradient.contiguous())
        return own


@contextmanager
def _exact_float32(device_type: str) -> Iterator[None]:
    """No autocast and no TF32: bfloat16 cosines step by 0.004 near 0.9, at temperature 0.03 an eighth of a logit."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
