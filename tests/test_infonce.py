"""The loss against a float64 loop over eq. 1, and 2 and 3 gloo ranks against one process, also by GradCache."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from gve.items import EmbedBatch
from gve.model import gradcache, infonce
from gve.model.gradcache import grad_cache
from gve.model.infonce import Contrast, HardNegatives, info_nce

TAU = 0.03


@dataclass
class Case:
    """A global batch of 12 pairs with everything that can go wrong, before its rows are made unit vectors."""

    query: np.ndarray
    target: np.ndarray
    hard: np.ndarray
    index: np.ndarray
    hard_ids: np.ndarray
    hard_valid: np.ndarray
    query_ids: np.ndarray
    target_ids: np.ndarray
    valid: np.ndarray


def make_case() -> Case:
    rng = np.random.default_rng(0)
    # Rows around one direction: close enough that no softmax term vanishes at temperature 0.03.
    near = rng.normal(size=6)
    query, target, hard = (near + 0.15 * rng.normal(size=(rows, 6)) for rows in (12, 12, 14))
    index = np.full((12, 2), -1)
    for pair, own in enumerate([[0, 1], [2], [], [3, 4], [5], [6, 7], [8], [9], [10, 11], [], [12], [13]]):
        index[pair, : len(own)] = own
    query_ids = np.array([1, 2, 3, 4, 5, 2, 7, 8, 9, 10, 11, 12])  # pairs 1 and 5 share a query (on other ranks)
    target_ids = np.array([11, 12, 13, 14, 15, 16, 13, 14, 19, 20, 21, 22])  # 2 and 6, 3 and 7 share a target
    hard_ids = np.arange(31, 45)
    hard_ids[3] = 14  # equals the positive of its pair 3
    hard_valid = np.arange(14) != 9
    valid = np.arange(12) != 4  # one bad pair, on one rank only
    return Case(query, target, hard, index, hard_ids, hard_valid, query_ids, target_ids, valid)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def reference(case: Case, margin: float = math.inf, sides: tuple[int, ...] = (0, 1)) -> dict[str, torch.Tensor]:
    """Eq. 1 as written, pair by pair in float64, with the masks of the docstring; and its gradient.

    The gradient is that by one matrix, at the identity, that all rows go through before they are made unit vectors.
    """
    weight = torch.eye(6, dtype=torch.float64, requires_grad=True)
    q, t, h = (
        rows / rows.norm(dim=1, keepdim=True)
        for rows in (torch.tensor(side) @ weight for side in (case.query, case.target, case.hard))
    )
    losses, positives, gaps, cosines = [], [], [], []
    for i in range(len(q)):
        if not case.valid[i]:
            continue
        positive = q[i] @ t[i]
        rivals = [
            j
            for j in range(len(q))
            if j != i
            and case.valid[j]
            and case.query_ids[i] != case.query_ids[j]
            and case.target_ids[i] != case.target_ids[j]
        ]
        own_hard = [
            q[i] @ h[k]
            for k in case.index[i]
            if k >= 0 and case.hard_valid[k] and case.hard_ids[k] != case.target_ids[i]
        ]
        forward = [s for s in [q[i] @ t[j] for j in rivals] + own_hard if s <= positive + margin]
        backward = [s for s in [t[i] @ q[j] for j in rivals] if s <= positive + margin]
        both = [
            -torch.log(torch.exp(positive / TAU) / sum(torch.exp(s / TAU) for s in [positive, *negatives]))
            for negatives in (forward, backward)
        ]
        losses.append(sum(both[side] for side in sides) / len(sides))
        positives.append(positive)
        gaps.append(positive - max(forward))
        cosines += [s for s in [positive] + [q[i] @ t[j] for j in rivals] if s <= positive + margin]
    means = {
        "mean_loss": losses,
        "mean_relevance": cosines,
        "mean_positive": positives,
        "max_negative_gap": gaps,
        "accuracy": [(gap > 0).double() for gap in gaps],
    }
    found = {name: torch.stack(values).mean() for name, values in means.items()}
    (found["gradient"],) = torch.autograd.grad(found["mean_loss"], weight)
    return {name: value.detach() for name, value in found.items()}


WATCHED = ("mean_loss", "mean_relevance", "mean_positive", "max_negative_gap", "accuracy")


def run(case: Case, weight: torch.Tensor, rows: slice, contrast: Contrast | None = None) -> infonce.InfoNCE:
    """info_nce of some rows of the case, embedded by one weight matrix, so that gradients have a place to meet."""
    used = own_hard(case, rows)
    sides = (torch.tensor(side, dtype=weight.dtype) for side in (case.query[rows], case.target[rows], case.hard[used]))
    return loss_of(case, rows, *(embed(side, weight) for side in sides), contrast=contrast)


def embed(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(rows @ weight, dim=-1)


def own_hard(case: Case, rows: slice) -> list[int]:
    """The hard negatives that these pairs bring along."""
    return sorted({int(k) for k in case.index[rows].flatten() if k >= 0})


def loss_of(
    case: Case,
    rows: slice,
    query: torch.Tensor,
    target: torch.Tensor,
    hard: torch.Tensor,
    contrast: Contrast | None = None,
) -> infonce.InfoNCE:
    used = own_hard(case, rows)
    local = np.array([[used.index(k) if k >= 0 else -1 for k in row] for row in case.index[rows]])
    return info_nce(
        query,
        target,
        contrast or Contrast(TAU),
        negatives=HardNegatives(
            hard, torch.tensor(local), torch.tensor(case.hard_ids[used]), torch.tensor(case.hard_valid[used])
        ),
        content_ids=(torch.tensor(case.query_ids[rows]), torch.tensor(case.target_ids[rows])),
        valid=torch.tensor(case.valid[rows]),
    )


def test_two_pairs_by_hand() -> None:
    # Cosines 1 with the own and 0 with the other, temperature 0.5: both sides are log(1 + exp(-2)) = 0.126928.
    eye = torch.eye(2)
    result = info_nce(eye, eye, Contrast(0.5))
    assert float(result.loss) == pytest.approx(0.126928, abs=1e-6)
    assert (float(result.mean_relevance), float(result.mean_positive)) == (0.5, 1.0)
    assert (float(result.max_negative_gap), float(result.accuracy)) == (1.0, 1.0)


@pytest.mark.parametrize("margin", [None, 0.05])
@pytest.mark.parametrize("tile", [0, 1, 5, 12])
def test_equals_eq_1_in_float64(margin: float | None, tile: int) -> None:
    """Ragged negatives, masked rows, shared contents; loss and gradient to 1e-10, whole and in tiles."""
    case = make_case()
    expected = reference(case, math.inf if margin is None else margin)
    weight = torch.eye(6, dtype=torch.float64, requires_grad=True)
    result = run(case, weight, slice(0, 12), Contrast(TAU, margin, tile))
    for name in WATCHED:
        assert float(getattr(result, name)) == pytest.approx(float(expected[name]), abs=1e-10), name
    (gradient,) = torch.autograd.grad(result.loss, weight)
    torch.testing.assert_close(gradient, expected["gradient"], atol=1e-10, rtol=1e-9)
    assert gradient.abs().max() > 0.1
    # float32, as in training: what is left is rounding.
    single = run(case, torch.eye(6), slice(0, 12), Contrast(TAU, margin, tile))
    assert float(single.loss) == pytest.approx(float(expected["mean_loss"]), abs=2e-5)


def test_tiles_bound_the_memory() -> None:
    """512 pairs: no tensor of the loss, forward or backward, has more than 512 * 32 values; whole it has 512 * 512."""
    query, target = (torch.nn.functional.normalize(torch.randn(512, 8), dim=1).requires_grad_() for _ in range(2))
    largest = {}
    for tile in (0, 32):
        with Largest() as found:
            info_nce(query, target, Contrast(TAU, None, tile)).loss.backward()
        largest[tile] = found.numel
    assert largest == {0: 512 * 512, 32: 512 * 32}


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation inside gives."""

    numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for one in torch.utils._pytree.tree_leaves(out):
            if isinstance(one, torch.Tensor):
                self.numel = max(self.numel, one.numel())
        return out


def test_one_sided_loss_or_a_missing_mask_would_be_seen() -> None:
    """Negative control of the test above: each planted fault moves the reference by far more than its tolerance."""
    right = reference(make_case())["mean_loss"]
    assert abs(reference(make_case(), sides=(0,))["mean_loss"] - right) > 1e-3
    for name, value in (("query_ids", range(12)), ("target_ids", range(12)), ("hard_ids", range(100, 114))):
        case = make_case()
        setattr(case, name, np.array(value))
        assert abs(reference(case)["mean_loss"] - right) > 1e-3, name
    for name in ("valid", "hard_valid"):
        case = make_case()
        getattr(case, name)[:] = True
        assert abs(reference(case)["mean_loss"] - right) > 1e-3, name
    assert abs(reference(make_case(), margin=0.05)["mean_loss"] - right) > 1e-3


def test_one_direction_is_the_first_term_of_eq_1() -> None:
    """`symmetric: false` is query to target alone: loss and gradient to 1e-10; both directions are another loss."""
    case = make_case()
    expected = reference(case, sides=(0,))
    weight = torch.eye(6, dtype=torch.float64, requires_grad=True)
    result = run(case, weight, slice(0, 12), Contrast(TAU, symmetric=False))
    assert float(result.mean_loss) == pytest.approx(float(expected["mean_loss"]), abs=1e-10)
    (gradient,) = torch.autograd.grad(result.loss, weight)
    torch.testing.assert_close(gradient, expected["gradient"], atol=1e-10, rtol=1e-9)
    assert (gradient - reference(case)["gradient"]).abs().max() > 1e-3


def test_masked_rows_and_columns_get_no_gradient() -> None:
    rows = torch.nn.functional.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    query, target = rows.clone().requires_grad_(), rows.flip(0).clone().requires_grad_()
    info_nce(query, target, valid=torch.tensor([True, True, False, True])).loss.backward()
    for gradient in (query.grad, target.grad):
        assert gradient is not None
        assert gradient[2].abs().max() == 0
        assert gradient[[0, 1, 3]].abs().amax(1).min() > 0


def test_no_valid_pair_gives_zero_and_no_nan_in_the_gradient() -> None:
    query = torch.eye(2, requires_grad=True)
    result = info_nce(query, torch.eye(2), valid=torch.zeros(2, dtype=torch.bool))
    result.loss.backward()
    assert result.loss.item() == 0
    assert math.isnan(result.max_negative_gap.item())
    assert query.grad is not None
    assert query.grad.abs().max() == 0


def test_float32_under_autocast() -> None:
    """bfloat16 would miss: its cosines near 0.9 step by 0.004, which is 0.13 of a logit at temperature 0.03."""
    case = make_case()
    q, t = (torch.tensor(unit(x), dtype=torch.float32) for x in (case.query, case.target))
    exact = float(info_nce(q, t).loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert float(info_nce(q, t).loss) == exact
        logits = (q @ t.T / TAU).float()
    rounded = (2 * logits.diagonal() - logits.logsumexp(0) - logits.logsumexp(1)).mean() / -2
    assert abs(float(rounded) - exact) > 1e-3


class Step(torch.nn.Module):
    """The training step of some pairs of the case, whole or by GradCache, over rows of 1 to 3 tokens."""

    def __init__(self, case: Case, rows: slice) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(6))
        self.case, self.rows = case, rows

    def forward(self, max_tokens: int) -> torch.Tensor:
        case, rows = self.case, self.rows
        table = torch.tensor(np.concatenate([case.query, case.target, case.hard]), dtype=torch.float32)
        pairs = range(len(case.query))[rows]
        sides = [[*pairs], [12 + pair for pair in pairs], [24 + k for k in own_hard(case, rows)]]
        result = grad_cache(
            lambda batch: embed(table[batch.input_ids[:, 0]], self.weight),
            [named(side) for side in sides],
            partial(loss_of, case, rows),
            [self.weight],
            max_tokens=max_tokens,
            seed=0,
        )
        return result.loss


def named(rows: list[int]) -> EmbedBatch:
    """A batch whose first tokens are these numbers; the later of 12 the longer."""
    lengths = torch.tensor([1 + row % 12 // 4 for row in rows])
    mask = (torch.arange(3) < lengths[:, None]).long()[:, : int(lengths.max())]
    ids = torch.tensor(rows)[:, None].expand_as(mask)
    return EmbedBatch(
        ids, mask, ids.expand(3, *ids.shape), lengths - 1, torch.tensor(rows), torch.ones(len(rows), dtype=torch.bool)
    )


def _rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    case, rows = make_case(), slice(12 // world * rank, 12 // world * (rank + 1))
    found: dict[str, Any] = {}
    with_gradient = infonce._GatherWithGradient.apply
    for name, gather, tile in (
        ("right", with_gradient, 0),
        ("tiled", with_gradient, 5),
        ("detached", lambda rows: with_gradient(rows.detach()), 0),
    ):
        infonce._GatherWithGradient.apply = staticmethod(gather)  # type: ignore[method-assign]
        weight = torch.eye(6, requires_grad=True)
        result = run(case, weight, rows, Contrast(TAU, None, tile))
        result.loss.backward()
        # What DDP does: the mean over the ranks.
        assert weight.grad is not None
        gradient, loss = weight.grad.clone(), result.loss.detach().clone()
        dist.all_reduce(gradient)
        dist.all_reduce(loss)
        found[f"{name}_gradient"], found[f"{name}_loss"] = gradient.numpy() / world, loss.numpy() / world
        found |= {f"{name}_{m}": getattr(result, m).numpy() for m in WATCHED}

    infonce._GatherWithGradient.apply = staticmethod(with_gradient)  # type: ignore[method-assign]
    step = DistributedDataParallel(Step(case, rows))
    reduced: list[int] = []

    def reduce(state, bucket):  # type: ignore[no-untyped-def]  # DDP reads annotations, and would meet strings
        reduced.append(bucket.buffer().numel())
        return default_hooks.allreduce_hook(dist.group.WORLD, bucket)

    step.register_comm_hook(None, reduce)
    counts = []
    kept = gradcache.same_count_on_all_ranks
    gradcache.same_count_on_all_ranks = lambda chunks: counts.append(len(chunks)) or kept(chunks)  # type: ignore
    step(max_tokens=5).backward()
    found |= {"cached_gradient": step.module.weight.grad.numpy(), "reduced": reduced, "chunks": counts}
    np.savez(f"{folder}/rank{rank}.npz", **found)
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_equal_one_process(world: int, tmp_path: Path) -> None:
    """Loss, gradients and logged values of 2 and 3 gloo ranks are those of one process with all 12 pairs."""
    weight = torch.eye(6, requires_grad=True)
    one = run(make_case(), weight, slice(0, 12))
    one.loss.backward()
    assert weight.grad is not None
    expected = weight.grad.numpy()

    context = mp.spawn(_rank, args=(world, str(tmp_path)), nprocs=world, join=False)
    deadline = time.monotonic() + 150
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, f"{world} gloo ranks did not finish in 150 s"
    finally:
        for process in context.processes:
            process.kill()
    results = [np.load(tmp_path / f"rank{rank}.npz") for rank in range(world)]
    for found in results:
        for name in ("right", "tiled"):
            np.testing.assert_allclose(found[f"{name}_gradient"], expected, atol=2e-5, rtol=1e-5)
            assert found[f"{name}_loss"] == pytest.approx(one.loss.item(), abs=1e-5)
            for value in WATCHED:
                assert found[f"{name}_{value}"] == pytest.approx(getattr(one, value).item(), abs=1e-5), value
        # Negative control: without gradient through the gather the loss is right and the gradient is not.
        wrong, right = found["detached_gradient"].ravel(), expected.ravel()
        assert found["detached_loss"] == pytest.approx(one.loss.item(), abs=1e-5)
        assert np.abs(wrong - right).max() > 1e-2
        assert wrong @ right / np.linalg.norm(wrong) / np.linalg.norm(right) < 0.999
        # GradCache under DDP: the same gradient, reduced in one all-reduce of its 36 values.
        np.testing.assert_allclose(found["cached_gradient"], expected, atol=2e-5, rtol=1e-5)
        assert found["reduced"].tolist() == [36]
    # The ranks had chunks in unequal numbers, and had to be kept together.
    assert len({int(found["chunks"][0]) for found in results}) > 1
