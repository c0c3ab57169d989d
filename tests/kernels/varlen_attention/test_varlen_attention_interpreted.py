"""Triton kernels of varlen_attention in the interpreter: outputs and gradients against the oracle.

tests/kernels/test_interpreter.py runs this file in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import interpreted
from large_scores import LARGEST, check_large_scores
from torch import Tensor

from fastmtl_kernels.varlen_attention import reference
from fastmtl_kernels.varlen_attention.plan import AttentionPlan

pytestmark = interpreted
SEED = torch.tensor([-77])


def filled_with_nan(*args: object, **kwargs: Any) -> Tensor:
    return EMPTY(*args, **kwargs).fill_(math.nan)  # type: ignore[call-overload]


EMPTY = torch.empty


def run(qkv: Tensor, grad: Tensor, offsets: list[int], scale: float, dropout_p: float, impl: Any) -> list[Tensor]:
    """Return O and dqkv; unwritten elements are NaN."""
    from fastmtl_kernels.varlen_attention.triton import launch as varlen_attention_triton

    qkv = qkv.detach().requires_grad_()
    with mock.patch.object(torch, "empty", filled_with_nan):
        if impl == "triton":
            plan = AttentionPlan.make(offsets, len(qkv))
            out = varlen_attention_triton.varlen_attention(qkv, plan, scale, dropout_p, SEED)
        else:
            out = reference.varlen_attention(qkv, offsets, scale, dropout_p, SEED)
        return [out.detach(), *torch.autograd.grad(out, qkv, grad.to(out.dtype))]


def check(
    lengths: list[int], tail: int, num_heads: int, head_dim: int, dtype: torch.dtype, scale: float, dropout_p: float
) -> None:
    """Check the error: at most twice the oracle's own in this dtype, plus rounding."""
    generator = torch.Generator().manual_seed(sum(lengths))
    offsets = [0, *accumulate(lengths)]
    # Views of wider tensors: no stride is that of a contiguous tensor.
    wide = torch.randn(offsets[-1] + tail, 3, num_heads + 1, head_dim + 3, generator=generator).to(dtype)
    wide[offsets[-1] :] = math.nan
    qkv = wide[:, :, 1:, 3:]
    grad = torch.randn(len(qkv), num_heads, head_dim + 1, generator=generator).to(dtype)[..., 1:]
    results = run(qkv, grad, offsets, scale, dropout_p, "triton")
    rounded = run(qkv, grad, offsets, scale, dropout_p, "reference")
    exact = run(qkv.double(), grad.double(), offsets, scale, dropout_p, "reference")
    for result, oracle, truth in zip(results, rounded, exact, strict=True):
        assert result.dtype == dtype and result.shape == truth.shape
        size = float(truth.abs().max()) if truth.numel() else 0.0
        off = float((oracle.double() - truth).abs().max()) if truth.numel() else 0.0
        # P and dS are rounded to the dtype of the dots: a few units of the largest entry.
        assert ((result.double() - truth).abs() <= 2 * off + 4 * torch.finfo(dtype).eps * size + 1e-7).all()
        assert not result[offsets[-1] :].any()


head_dims = st.sampled_from([1, 11, 16, 17, 32, 34, 64])
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
scales = st.sampled_from([0.25, -0.5])
probabilities = st.sampled_from([0.0, 0.1, 0.75])


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 64), max_size=6),
    tail=st.integers(0, 5),
    num_heads=st.integers(1, 2),
    head_dim=head_dims,
    dtype=dtypes,
    scale=scales,
    dropout_p=probabilities,
)
def test_short_sequences(
    lengths: list[int],
    tail: int,
    num_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    scale: float,
    dropout_p: float,
) -> None:
    check(lengths, tail, num_heads, head_dim, dtype, scale, dropout_p)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.sampled_from([0, 5, 64, 65, 100, 128, 129]), min_size=1, max_size=2),
    tail=st.integers(0, 70),
    num_heads=st.just(1),
    head_dim=head_dims,
    dtype=dtypes,
    scale=scales,
    dropout_p=probabilities,
)
def test_long_sequences_among_short_ones(
    lengths: list[int],
    tail: int,
    num_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    scale: float,
    dropout_p: float,
) -> None:
    check(lengths, tail, num_heads, head_dim, dtype, scale, dropout_p)


def test_the_widest_head_and_the_longest_sequence() -> None:
    check([300, 3], 0, 1, 128, torch.float16, 128**-0.5, 0.1)
    check([130, 40], 0, 1, 128, torch.bfloat16, 128**-0.5, 0.1)
    check([512], 0, 1, 16, torch.float32, 0.25, 0.0)


def test_empty_tiles_and_blocks_do_nothing() -> None:
    """A plan can be padded to a fixed size: -1 in every slot of a tile, zeros in a block."""
    from fastmtl_kernels.varlen_attention.triton.launch import backward, forward

    generator = torch.Generator().manual_seed(0)
    qkv, grad = torch.randn(120, 3, 2, 16, generator=generator), torch.randn(120, 2, 16, generator=generator)
    plan = AttentionPlan.make([0, 20, 90, 110], 120)
    blank = torch.full((3, 64), -1, dtype=torch.int32)
    parts = [plan.tile_rows, blank, plan.tile_starts, blank, plan.blocks, torch.zeros(2, 3, dtype=torch.int32)]
    numbers = torch.cat([part.flatten() for part in parts])
    filled = AttentionPlan(numbers, plan.num_tiles + 3, plan.num_rows)
    assert filled.num_blocks == plan.num_blocks + 2
    found = []
    for one in (plan, filled):
        with mock.patch.object(torch, "empty", filled_with_nan):
            out, stats = forward(qkv, one, 0.25, 0.1, SEED)
            found.append((out, backward(qkv, out, stats, grad, one, 0.25, 0.1, SEED)))
    for right, result in zip(*found, strict=True):
        assert right.isfinite().all() and torch.equal(right, result)


def test_large_scores() -> None:
    """exp2 has no argument above 0, so neither kind of kernel overflows."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(100, 3, 1, 16, generator=generator)
    qkv[:, :2] *= 30
    grad = torch.randn(100, 1, 16, generator=generator)
    for offsets in ([0, 40, 100], [0, 100]):
        results = run(qkv, grad, offsets, 1.0, 0.0, "triton")
        exact = run(qkv.double(), grad.double(), offsets, 1.0, 0.0, "reference")
        for result, truth in zip(results, exact, strict=True):
            assert ((result - truth).abs() <= 1e-3 * truth.abs().max()).all()


def by_triton(qkv: Tensor, offsets: Sequence[int], scale: float, dropout_p: float, seed: Tensor) -> Tensor:
    from fastmtl_kernels.varlen_attention.triton import launch as varlen_attention_triton

    plan = AttentionPlan.make(list(offsets), len(qkv))
    return varlen_attention_triton.varlen_attention(qkv, plan, scale, dropout_p, seed)


@pytest.mark.parametrize("largest", LARGEST)
@pytest.mark.parametrize("lengths", [[5, 1, 63], [71]], ids=["short", "long"])
def test_gradients_of_large_scores(lengths: list[int], largest: float) -> None:
    """Gradients are as accurate as those of plain float32, in either kind of kernel."""
    for scale, dropout_p in ((0.125, 0.0), (-0.125, 0.3)):
        check_large_scores(by_triton, lengths, largest, scale, dropout_p)
