"""PCGrad and GradVac in coefficient form, against the textbook loops on vectors and TorchJD."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchjd.aggregation import GradVacWeighting, PCGradWeighting

from fastmtl_kernels import gradvac_weights, pcgrad_weights

SEEDS = st.integers(0, 10_000)
TASKS = st.integers(1, 8)


def random_rows(num_tasks: int, size: int, seed: int) -> Tensor:
    """Task gradients in float64 with conflicts; sometimes one is zero."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_tasks, size, generator=generator, dtype=torch.float64)
    rows *= torch.rand(num_tasks, 1, generator=generator, dtype=torch.float64) * 10
    if seed % 3 == 0:
        rows[seed % num_tasks] = 0
    return rows


def random_order(num_tasks: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(num_tasks, generator=generator) for _ in range(num_tasks)])


def textbook_pcgrad(rows: Tensor, order: Tensor) -> Tensor:
    merged = torch.zeros_like(rows[0])
    for i, row_order in enumerate(order.tolist()):
        projected = rows[i].clone()
        for j in row_order:
            dot = projected @ rows[j]
            if j != i and dot < 0:
                projected -= dot / (rows[j] @ rows[j]) * rows[j]
        merged += projected
    return merged


def textbook_gradvac(rows: Tensor, target: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    merged, cosines = torch.zeros_like(rows[0]), torch.ones_like(target)
    for i, row_order in enumerate(order.tolist()):
        moved = rows[i].clone()
        for j in row_order:
            if j == i:
                continue
            norm_i, norm_j, wanted = moved.norm(), rows[j].norm(), target[i, j]
            if norm_i == 0 or norm_j == 0:
                cosines[i, j] = wanted
                continue
            phi = cosines[i, j] = moved @ rows[j] / (norm_i * norm_j)
            if phi < wanted:
                sine, wanted_sine = (1 - phi**2).clamp(min=0).sqrt(), (1 - wanted**2).sqrt()
                moved += norm_i * (wanted * sine - phi * wanted_sine) / (norm_j * wanted_sine) * rows[j]
        merged += moved
    return merged, cosines


@settings(max_examples=60, deadline=None)
@given(num_tasks=TASKS, size=st.integers(1, 9), seed=SEEDS)
def test_pcgrad_is_the_textbook_loop(num_tasks: int, size: int, seed: int) -> None:
    rows, order = random_rows(num_tasks, size, seed), random_order(num_tasks, seed)
    merged = pcgrad_weights(rows @ rows.T, order) @ rows
    torch.testing.assert_close(merged, textbook_pcgrad(rows, order), rtol=1e-8, atol=1e-8)


@settings(max_examples=60, deadline=None)
@given(num_tasks=st.integers(1, 8), seed=SEEDS)
def test_pcgrad_equals_torchjd(num_tasks: int, seed: int) -> None:
    """The same seed gives TorchJD's weights, row by row from the same permutations.

    TorchJD has no guard for zero gradients.
    """
    rows = random_rows(num_tasks, 12, 3 * seed + 1)
    gram = rows @ rows.T
    torch.manual_seed(seed)
    theirs = PCGradWeighting()(gram)
    torch.manual_seed(seed)
    torch.testing.assert_close(pcgrad_weights(gram), theirs)
    torch.testing.assert_close(pcgrad_weights(gram, generator=torch.Generator().manual_seed(seed)), theirs)
    torch.testing.assert_close(pcgrad_weights(gram, random_order(num_tasks, seed)), theirs)


@settings(max_examples=60, deadline=None)
@given(num_tasks=TASKS, size=st.integers(2, 9), seed=SEEDS)
def test_gradvac_is_the_textbook_loop(num_tasks: int, size: int, seed: int) -> None:
    rows, order = random_rows(num_tasks, size, seed), random_order(num_tasks, seed)
    target = torch.rand(num_tasks, num_tasks, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.3
    weights, cosines = gradvac_weights(rows @ rows.T, target, order)
    merged, expected_cosines = textbook_gradvac(rows, target, order)
    torch.testing.assert_close(cosines, expected_cosines, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(weights @ rows, merged, rtol=1e-6, atol=1e-6)


def test_gradvac_equals_torchjd_over_steps() -> None:
    """The caller keeps the moving average of the cosines, as the docstring says."""
    num_tasks, beta = 4, 0.1
    theirs, target = GradVacWeighting(beta=beta, eps=0.0), torch.zeros(num_tasks, num_tasks, dtype=torch.float64)
    for step in range(20):
        rows = random_rows(num_tasks, 12, 3 * step + 1)
        torch.manual_seed(step)
        expected = theirs(rows @ rows.T)
        torch.manual_seed(step)
        others = [[j for j in range(num_tasks) if j != i] for i in range(num_tasks)]
        order = torch.tensor(
            [[*(others[i][k] for k in torch.randperm(num_tasks - 1).tolist()), i] for i in range(num_tasks)]
        )
        weights, cosines = gradvac_weights(rows @ rows.T, target, order)
        target.lerp_(cosines, beta)
        torch.testing.assert_close(weights, expected)


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, target=st.floats(-0.9, 0.95))
def test_gradvac_reaches_its_target(seed: int, target: float) -> None:
    """Two tasks: the modified gradient's cosine with the other is at least the target."""
    rows = random_rows(2, 5, 3 * seed + 1)
    targets = torch.full((2, 2), target, dtype=torch.float64)
    targets[1] = -1  # row 1 stays as it is
    weights, cosines = gradvac_weights(rows @ rows.T, targets)
    moved = weights @ rows - rows[1]
    reached = torch.cosine_similarity(moved, rows[1], dim=0)
    torch.testing.assert_close(reached, cosines[0, 1].clamp(min=target), rtol=1e-6, atol=1e-6)


def test_gradvac_leaves_the_targets_of_an_absent_task_alone() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 0.0], [-1.0, 0.1]])
    target = torch.tensor([[0.0, 0.3, 0.1], [0.2, 0.0, 0.7], [0.4, 0.6, 0.0]])
    weights, cosines = gradvac_weights(rows @ rows.T, target, torch.tensor([0, 1, 2]))
    assert torch.equal(cosines[1, [0, 2]], target[1, [0, 2]]) and torch.equal(cosines[[0, 2], 1], target[[0, 2], 1])
    assert weights[1] == 1 and weights.isfinite().all()


def test_a_target_of_one_stays_finite() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    weights, _ = gradvac_weights(rows @ rows.T, torch.ones(2, 2))
    assert weights.isfinite().all()


@pytest.mark.parametrize("method", ["pcgrad", "gradvac"])
@pytest.mark.parametrize("scale", [1e-15, 1e-3, 1.0, 1e15])
@settings(max_examples=25, deadline=None)
@given(num_tasks=TASKS, seed=SEEDS)
def test_finite_and_free_of_scale(method: str, scale: float, num_tasks: int, seed: int) -> None:
    rows, order = random_rows(num_tasks, 5, seed), random_order(num_tasks, seed)
    target = torch.full((num_tasks, num_tasks), 0.2)

    def weights(gram: Tensor) -> Tensor:
        return pcgrad_weights(gram, order) if method == "pcgrad" else gradvac_weights(gram, target, order)[0]

    scaled = weights((rows * scale @ rows.T * scale).float())
    assert scaled.dtype == torch.float32 and scaled.isfinite().all()
    unscaled = weights((rows @ rows.T).double())
    torch.testing.assert_close(scaled.double() @ rows, unscaled @ rows, rtol=1e-2, atol=1e-2)


@settings(max_examples=40, deadline=None)
@given(num_tasks=TASKS, seed=SEEDS)
def test_permuting_the_tasks_permutes_the_weights(num_tasks: int, seed: int) -> None:
    rows, order = random_rows(num_tasks, 7, seed), random_order(num_tasks, seed)
    permutation = torch.randperm(num_tasks, generator=torch.Generator().manual_seed(seed + 1))
    inverse = permutation.argsort()
    gram = rows @ rows.T
    permuted_gram, permuted_order = gram[permutation][:, permutation], inverse[order[permutation]]
    torch.testing.assert_close(pcgrad_weights(permuted_gram, permuted_order), pcgrad_weights(gram, order)[permutation])
    target = torch.rand(num_tasks, num_tasks, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.5
    permuted, _ = gradvac_weights(permuted_gram, target[permutation][:, permutation], permuted_order)
    torch.testing.assert_close(permuted, gradvac_weights(gram, target, order)[0][permutation], rtol=1e-6, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS)
def test_two_tasks_end_without_a_conflict(seed: int) -> None:
    rows = random_rows(2, 3, seed)
    merged = pcgrad_weights(rows @ rows.T) @ rows
    assert (rows @ merged >= -1e-9 * rows.square().sum()).all()


def test_without_conflicts_the_gradients_are_summed() -> None:
    gram = torch.tensor([[4.0, 1.0, 0.0], [1.0, 2.0, 3.0], [0.0, 3.0, 9.0]])
    assert torch.equal(pcgrad_weights(gram), torch.ones(3))
    assert torch.equal(gradvac_weights(gram, torch.full((3, 3), -0.1))[0], torch.ones(3))
    assert torch.equal(pcgrad_weights(gram, reduction="mean"), torch.full((3,), 1 / 3))


def test_opposed_gradients_cancel() -> None:
    gram = torch.tensor([[1.0, -2.0], [-2.0, 4.0]])
    rows = torch.tensor([[1.0], [-2.0]])
    assert torch.equal(pcgrad_weights(gram) @ rows, torch.zeros(1))


def test_one_permutation_serves_every_row() -> None:
    rows, order = random_rows(5, 6, 1), torch.tensor([3, 0, 4, 1, 2])
    gram = rows @ rows.T
    assert torch.equal(pcgrad_weights(gram, order), pcgrad_weights(gram, order.expand(5, 5)))
    assert torch.equal(pcgrad_weights(gram, order.int()), pcgrad_weights(gram, order))


def test_the_gramian_is_left_alone_and_its_order_matters() -> None:
    rows = random_rows(6, 4, 1)
    gram = rows @ rows.T
    before = gram.clone()
    results = {tuple(pcgrad_weights(gram, random_order(6, seed)).tolist()) for seed in range(5)}
    assert torch.equal(gram, before) and len(results) > 1


def test_a_non_finite_gramian_does_not_hang_or_raise() -> None:
    gram = torch.tensor([[math.nan, math.inf], [math.inf, 1.0]])
    assert pcgrad_weights(gram).shape == (2,)
