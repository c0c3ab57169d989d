"""The count-sketch: unbiased, within its variance bound, linear, and equal in every process."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastmtl.surgery.jacobian.sketch import CountSketch

CPU = torch.device("cpu")


def sketch(piece: Tensor, size: int, seed: int = 0, key: int = 0) -> CountSketch:
    made = CountSketch(len(piece), size, seed, CPU)
    made.add(key, piece)
    return made


def vectors(num_columns: int) -> Tensor:
    """Return three tasks' vectors; the first two have a cosine of -0.6."""
    one, two, three = torch.randn(3, num_columns, generator=torch.Generator().manual_seed(0))
    two = 0.8 * (two - (two @ one) / (one @ one) * one) / two.norm() - 0.6 * one / one.norm()
    return torch.stack([one, two * 5, three])


@pytest.mark.parametrize("num_columns", [50, 64, 1000, 4096 + 17])
def test_unbiased_and_within_its_variance(num_columns: int) -> None:
    size, draws = 64, 400
    piece = vectors(num_columns)
    exact = piece @ piece.T
    estimates = torch.stack([sketch(piece, size, seed).gramian() for seed in range(draws)])
    bound = ((exact.diagonal()[:, None] * exact.diagonal()[None, :] + exact.square()) / size).sqrt()
    root_mean_square = (estimates - exact).square().mean(0).sqrt()
    # 400 draws give a root mean square to some 4 % and a mean to bound / 20.
    assert (root_mean_square <= 1.15 * bound).all()
    assert ((estimates.mean(0) - exact).abs() <= 4 * bound / math.sqrt(draws)).all()
    if num_columns > size:
        assert (root_mean_square > 0.3 * bound)[0, 2]  # the estimate has an error; an exact value would pass any bound


def test_exact_where_everything_fits_into_one_block() -> None:
    piece = vectors(64)
    torch.testing.assert_close(sketch(piece, 64).gramian(), piece @ piece.T, rtol=1e-5, atol=1e-4)


def test_linear_over_micro_batches_and_ranks() -> None:
    one, two = vectors(1000), vectors(1000).flip(0)
    both = sketch(one, 128)
    both.add(0, two)
    torch.testing.assert_close(both.values, sketch(one + two, 128).values, rtol=1e-5, atol=1e-4)


def test_other_seeds_and_keys_are_other_hashes() -> None:
    piece = vectors(1000)
    first = sketch(piece, 128).values
    assert torch.equal(first, sketch(piece, 128).values)
    assert not torch.equal(first, sketch(piece, 128, seed=1).values)
    assert not torch.equal(first, sketch(piece, 128, key=1).values)


def test_rows_of_a_table_equal_the_dense_table_in_expectation_and_add_up() -> None:
    """Repeated ids fall into the same buckets, and so does their sum."""
    ids = torch.tensor([3, 9, 3, 1])
    rows = torch.randn(4, 8, generator=torch.Generator().manual_seed(2))
    summed = torch.stack([rows[0] + rows[2], rows[1], rows[3]])
    one, other = (CountSketch(1, 64, 5, CPU) for _ in range(2))
    one.add_rows(2, 0, ids, rows)
    other.add_rows(2, 0, torch.tensor([3, 9, 1]), summed)
    torch.testing.assert_close(one.values, other.values)
    exact = float(summed.square().sum())
    draws = []
    for seed in range(300):
        made = CountSketch(1, 64, seed, CPU)
        made.add_rows(2, 0, ids, rows)
        draws.append(float(made.gramian()))
    assert abs(sum(draws) / 300 - exact) <= 4 * exact * math.sqrt(2 / 64 / 300)


def test_half_precision_is_added_in_float32() -> None:
    piece = vectors(1000).bfloat16()
    torch.testing.assert_close(sketch(piece, 128).values, sketch(piece.float(), 128).values)
