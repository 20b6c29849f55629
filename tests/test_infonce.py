"""The loss against a float64 loop over eq. 1, and two gloo ranks against one process."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from gve.model import infonce
from gve.model.infonce import Contrast, HardNegatives, info_nce

TAU = 0.03


@dataclass
class Case:
    """A global batch of 8 pairs with everything that can go wrong, before its rows are made unit vectors."""

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
    query, target, hard = (near + 0.15 * rng.normal(size=(rows, 6)) for rows in (8, 8, 10))
    index = np.array([[0, 1], [2, -1], [-1, -1], [3, 4], [5, -1], [6, 7], [8, -1], [9, -1]])
    query_ids = np.array([1, 2, 3, 4, 5, 2, 7, 8])  # pairs 1 and 5 share a query (across ranks of 4 rows)
    target_ids = np.array([11, 12, 13, 14, 15, 16, 13, 14])  # 2 and 6, 3 and 7 share a target
    hard_ids = np.array([21, 22, 23, 14, 25, 26, 27, 28, 29, 30])  # hard negative 3 equals the positive of its pair 3
    hard_valid = np.ones(10, bool)
    hard_valid[9] = False
    valid = np.array([True, True, True, True, False, True, True, True])  # one bad pair, on the second rank only
    return Case(query, target, hard, index, hard_ids, hard_valid, query_ids, target_ids, valid)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def reference(case: Case, margin: float = math.inf, sides: tuple[int, ...] = (0, 1)) -> dict[str, float]:
    """Eq. 1 as written, pair by pair in float64, with the masks of the docstring."""
    q, t, h = unit(case.query), unit(case.target), unit(case.hard)
    losses, positives, gaps, cosines = [], [], [], []
    for i in range(8):
        if not case.valid[i]:
            continue
        positive = q[i] @ t[i]
        rivals = [
            j
            for j in range(8)
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
            -math.log(math.exp(positive / TAU) / sum(math.exp(s / TAU) for s in [positive, *negatives]))
            for negatives in (forward, backward)
        ]
        losses.append(sum(both[side] for side in sides) / len(sides))
        positives.append(positive)
        gaps.append(positive - max(forward))
        cosines += [s for s in [positive] + [q[i] @ t[j] for j in rivals] if s <= positive + margin]
    return {
        "mean_loss": float(np.mean(losses)),
        "mean_relevance": float(np.mean(cosines)),
        "mean_positive": float(np.mean(positives)),
        "max_negative_gap": float(np.mean(gaps)),
        "accuracy": float(np.mean(np.array(gaps) > 0)),
    }


def run(case: Case, weight: torch.Tensor, rows: slice, contrast: Contrast | None = None) -> infonce.InfoNCE:
    """info_nce of some rows of the case, embedded by one weight matrix, so that gradients have a place to meet."""
    embed = lambda x: torch.nn.functional.normalize(torch.tensor(x, dtype=torch.float32) @ weight, dim=-1)  # noqa: E731
    index = case.index[rows]
    used = sorted({int(k) for k in index.flatten() if k >= 0})
    local = np.array([[used.index(k) if k >= 0 else -1 for k in row] for row in index])
    return info_nce(
        embed(case.query[rows]),
        embed(case.target[rows]),
        contrast or Contrast(TAU),
        negatives=HardNegatives(
            embed(case.hard[used]),
            torch.tensor(local),
            torch.tensor(case.hard_ids[used]),
            torch.tensor(case.hard_valid[used]),
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
def test_equals_eq_1_in_float64(margin: float | None) -> None:
    case = make_case()
    result = run(case, torch.eye(6), slice(0, 8), Contrast(TAU, margin))
    expected = reference(case, math.inf if margin is None else margin)
    for name, value in expected.items():
        assert float(getattr(result, name)) == pytest.approx(value, abs=2e-5), name
    assert float(result.loss) == pytest.approx(expected["mean_loss"], abs=2e-5)


def test_one_sided_loss_or_a_missing_mask_would_be_seen() -> None:
    """Negative control of the test above: each planted fault moves the reference by far more than its tolerance."""
    right = reference(make_case())["mean_loss"]
    assert abs(reference(make_case(), sides=(0,))["mean_loss"] - right) > 1e-2
    for name, value in (("query_ids", range(8)), ("target_ids", range(8)), ("hard_ids", range(100, 110))):
        case = make_case()
        setattr(case, name, np.array(value))
        assert abs(reference(case)["mean_loss"] - right) > 1e-2, name
    for name in ("valid", "hard_valid"):
        case = make_case()
        getattr(case, name)[:] = True
        assert abs(reference(case)["mean_loss"] - right) > 1e-3, name
    assert abs(reference(make_case(), margin=0.05)["mean_loss"] - right) > 1e-2


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


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    case = make_case()
    found: dict[str, Any] = {}
    with_gradient = infonce._GatherWithGradient.apply
    for name, gather in (("right", with_gradient), ("detached", lambda rows: with_gradient(rows.detach()))):
        infonce._GatherWithGradient.apply = staticmethod(gather)  # type: ignore[method-assign]
        weight = torch.eye(6, requires_grad=True)
        result = run(case, weight, slice(4 * rank, 4 * rank + 4))
        result.loss.backward()
        # What DDP does: the mean over the ranks.
        assert weight.grad is not None
        gradient, loss = weight.grad.clone(), result.loss.detach().clone()
        dist.all_reduce(gradient)
        dist.all_reduce(loss)
        found[f"{name}_gradient"], found[f"{name}_loss"] = gradient.numpy() / 2, loss.numpy() / 2
        found |= {f"{name}_{m}": getattr(result, m).numpy() for m in reference(case)}
    np.savez(f"{folder}/rank{rank}.npz", **found)
    dist.destroy_process_group()


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    """Loss, gradients and logged values of 2 gloo ranks with 4 pairs each are those of one process with 8."""
    weight = torch.eye(6, requires_grad=True)
    one = run(make_case(), weight, slice(0, 8))
    one.loss.backward()
    assert weight.grad is not None

    context = mp.spawn(_rank, args=(str(tmp_path),), nprocs=2, join=False)
    deadline = time.monotonic() + 90
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, "two gloo ranks did not finish in 90 s"
    finally:
        for process in context.processes:
            process.kill()
    for rank in range(2):
        two = np.load(tmp_path / f"rank{rank}.npz")
        np.testing.assert_allclose(two["right_gradient"], weight.grad.numpy(), atol=2e-5, rtol=1e-5)
        assert two["right_loss"] == pytest.approx(one.loss.item(), abs=1e-5)
        for name in reference(make_case()):
            assert two[f"right_{name}"] == pytest.approx(getattr(one, name).item(), abs=1e-5), name
        # Negative control: without gradient through the gather the loss is right and the gradient is not.
        wrong, right = two["detached_gradient"].ravel(), weight.grad.numpy().ravel()
        assert two["detached_loss"] == pytest.approx(one.loss.item(), abs=1e-5)
        assert np.abs(wrong - right).max() > 1e-2
        assert wrong @ right / np.linalg.norm(wrong) / np.linalg.norm(right) < 0.999
