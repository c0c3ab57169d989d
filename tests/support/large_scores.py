"""Gradients of attention for nearly one-hot softmax, against float64 and float32's error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from fastmtl_kernels.varlen_attention import reference

LARGEST = (10, 500, 1_800, 400_000)
HEADS, HEAD_DIM, SEED = 1, 32, torch.tensor([5])

# The output of qkv, the offsets of its sequences, the scale, the dropout probability and the seed.
Attention = Callable[[Tensor, Sequence[int], float, float, Tensor], Tensor]


def check_large_scores(
    attention: Attention, lengths: list[int], largest: float, scale: float, dropout_p: float
) -> None:
    """Assert that dQ, dK and dV are within three times the oracle's float32 error, plus rounding.

    largest: the largest score. The rounding is that of dP - rowsum(P dP), which is 0 for a one-hot
    row: a few units of the largest dP. Three keys of each sequence are equal, so that no row that
    prefers them has a power of two as its sum.
    """
    generator = torch.Generator().manual_seed(1)
    offsets = [0, *accumulate(lengths)]
    qkv = torch.randn(offsets[-1], 3, HEADS, HEAD_DIM, generator=generator)
    grad = torch.randn(offsets[-1], HEADS, HEAD_DIM, generator=generator)
    for start, stop in pairwise(offsets):
        qkv[start + 1 : min(start + 3, stop), 1] = qkv[start, 1]
    qkv[:, :2] *= (largest / abs(scale) / float(_products(qkv[:, 0], qkv[:, 1], offsets).max())) ** 0.5

    def gradient(call: Attention, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        out = call(x, offsets, scale, dropout_p, SEED)
        return torch.autograd.grad(out, x, grad.to(x.dtype))[0].double()

    exact = gradient(reference.varlen_attention, qkv.double())
    plain = (gradient(reference.varlen_attention, qkv) - exact).abs()
    error = (gradient(attention, qkv) - exact).abs()
    of_dp = 2**-22 * abs(scale) * float(_products(grad, qkv[:, 2], offsets).max()) / (1 - dropout_p)
    rounding = [of_dp * float(qkv[:, 1].abs().max()), of_dp * float(qkv[:, 0].abs().max()), 1e-6]
    for part, name in enumerate(("dQ", "dK", "dV")):
        off, allowed = float(error[:, part].max()), 3 * float(plain[:, part].max()) + rounding[part]
        assert off <= allowed, f"{name} with scores of {largest:,}: off by {off:.1e}, and {allowed:.1e} is allowed"


def _products(a: Tensor, b: Tensor, offsets: Sequence[int]) -> Tensor:
    """Return the size of every product of rows of one sequence."""
    parts = [torch.einsum("ihd,jhd->hij", a[i:j], b[i:j]).abs().flatten() for i, j in pairwise(offsets)]
    return torch.cat(parts)
