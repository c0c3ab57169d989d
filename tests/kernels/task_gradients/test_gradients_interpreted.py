"""The Triton kernels of gramian and combine in Triton's interpreter, against float64.

tests/kernels/test_interpreter.py runs this file in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from interpreter import interpreted
from torch import Tensor

pytestmark = interpreted
DTYPES = [torch.float32, torch.float16]
new_empty = Tensor.new_empty


def filled_with_nan(tensor: Tensor, *size: Any, **kwargs: Any) -> Tensor:
    return new_empty(tensor, *size, **kwargs).fill_(math.nan)


def check(num_tasks: int, size: int, dtype: torch.dtype, out_dtype: torch.dtype, shift: int, seed: int) -> None:
    """Check both operations and the bits of two runs.

    Rows begin at any address, and outputs lie between guards.
    """
    from fastmtl_kernels.task_gradients import triton as gradients_triton

    generator = torch.Generator().manual_seed(seed)
    memory = torch.randn(num_tasks, size + shift + 9, generator=generator).to(dtype)
    grads = [[row[shift + t % 3 : shift + t % 3 + size]] for t, row in enumerate(memory)]
    rows = torch.stack([row for (row,) in grads]).double()
    weights = torch.randn(num_tasks, generator=generator)

    # Small pieces, two at a time, so that small tensors have several. Unwritten elements are NaN.
    with (
        mock.patch.multiple(gradients_triton, STEPS=2, BLOCK_PIECES=2),
        mock.patch.object(Tensor, "new_empty", filled_with_nan),
    ):
        gram, again = (gradients_triton.gramian(grads) for _ in range(2))
    norms = rows.norm(dim=1)
    assert gram.dtype == torch.float32 and torch.equal(gram, again) and torch.equal(gram, gram.T)
    assert ((gram.double() - rows @ rows.T).abs() <= 1e-5 * norms[:, None] * norms).all()

    guarded = [torch.full((shift + size + 8,), math.nan, dtype=out_dtype) for _ in range(2)]
    for out in guarded:
        gradients_triton.combine(grads, weights, [out[shift : shift + size]])
        assert out[:shift].isnan().all() and out[shift + size :].isnan().all()
    merged, twin = (out[shift : shift + size] for out in guarded)
    exact, magnitude = weights.double() @ rows, weights.double().abs() @ rows.abs()
    rounding = 0.0 if out_dtype == torch.float32 else torch.finfo(out_dtype).eps / 2
    bound = 1.01 * rounding * exact.abs() + (num_tasks + 1) * 2**-23 * magnitude + torch.finfo(out_dtype).tiny
    assert torch.equal(merged, twin) and ((merged.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tasks", range(1, 10))
def test_every_number_of_tasks(num_tasks: int, dtype: torch.dtype) -> None:
    """One or two pieces, the last one incomplete; nine tasks by groups."""
    check(num_tasks, 1500 if num_tasks <= 8 else 700, dtype, dtype, 0, 0)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    num_tasks=st.integers(1, 4),
    size=st.integers(1, 5000),
    dtype=st.sampled_from(DTYPES),
    as_float=st.booleans(),
    shift=st.integers(0, 8),
    seed=st.integers(0, 100),
)
@example(2, 1, torch.float32, False, 1, 0)
@example(2, 1024, torch.float32, False, 0, 0)
@example(2, 2047, torch.float16, False, 3, 0)
@example(2, 4096, torch.float16, True, 0, 0)
def test_any_size_and_alignment(
    num_tasks: int, size: int, dtype: torch.dtype, as_float: bool, shift: int, seed: int
) -> None:
    check(num_tasks, size, dtype, torch.float32 if as_float else dtype, shift, seed)


def test_non_finite_gradients_show_and_empty_ones_are_taken() -> None:
    from fastmtl_kernels.task_gradients import triton as gradients_triton

    rows = torch.randn(3, 1001, generator=torch.Generator().manual_seed(0))
    rows[1, 1000] = math.inf
    finite = gradients_triton.gramian([[row] for row in rows]).isfinite()
    assert not finite[1].any() and finite[0, 0] and finite[0, 2] and finite[2, 2]
    empty = [[torch.empty(0)] for _ in range(2)]
    assert torch.equal(gradients_triton.gramian(empty), torch.zeros(2, 2))
    gradients_triton.combine(empty, torch.ones(2), [torch.empty(0)])
