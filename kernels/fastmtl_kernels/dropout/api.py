"""Row-wise dropout whose mask is a pure function of a seed.

    y = keep x / (1 - dropout_p)      dx = keep dy / (1 - dropout_p)

x, y [N, d]; keep by fastmtl_kernels.philox, the same that add_layer_norm drops with the same seed. Nothing is kept for
backward but the seed. Source: Srivastava et al., Dropout, 2014.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastmtl_kernels.add_layer_norm import reference
from fastmtl_kernels.dispatch import RowImpl, backend, select
from fastmtl_kernels.philox import check_dropout, describe


def dropout(x: Tensor, dropout_p: float, seed: Tensor | None, *, impl: RowImpl = "auto") -> Tensor:
    """Drops elements of rows.

    Args:
        x: [..., d], floating point, any strides; the row of an element is counted over all leading dimensions.
        dropout_p: the probability of dropping an element, in [0, 1); 0 returns x.
        seed: int64 of one element on x's device, one for each call in a step; needed where dropout_p > 0.
        impl: "auto", "reference", "triton" (CUDA tensors) or "cpp" (CPU tensors).

    Returns:
        [..., d] of x's dtype.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device; the message names it.
        RuntimeError: the implementation asked for is not available here; the message says why.
    """
    if not isinstance(x, Tensor) or x.dim() == 0 or not x.is_floating_point():
        raise ValueError(f"x must be floating point of shape [..., d], got {describe(x)}")
    check_dropout(dropout_p, seed, x.device)
    kernels = backend("dropout", select(impl, x))
    if dropout_p == 0 or x.numel() == 0:
        return x
    rows = x.reshape(-1, x.shape[-1])
    if kernels is None:
        return reference.dropout(rows, dropout_p, seed).view(x.shape)
    return _Dropout.apply(rows, dropout_p, seed, kernels).view(x.shape)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dropout_p: float, seed: Tensor, kernels: ModuleType) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.dropout_p, ctx.kernels = dropout_p, kernels
        return kernels.dropout(x, dropout_p, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (seed,) = ctx.saved_tensors
        return ctx.kernels.dropout(dy, ctx.dropout_p, seed), None, None, None
