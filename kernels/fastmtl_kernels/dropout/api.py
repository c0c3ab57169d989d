"""Row-wise dropout with a mask that depends only on a seed.

    y = keep x / (1 - dropout_p)      dx = keep dy / (1 - dropout_p)

x, y [N, d]. keep is the mask of fastmtl_kernels.philox, 0 or 1 for each element; add_layer_norm
with the same seed has the same mask. Only the seed is kept for backward, which draws the mask
again. An implementation is a module with `dropout`.

Source: see fastmtl_kernels.dropout.reference.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastmtl_kernels.checks import check_dropout, describe
from fastmtl_kernels.dispatch import RowImpl, select
from fastmtl_kernels.dropout import cpp, reference


def dropout(x: Tensor, dropout_p: float, seed: Tensor | None, *, impl: RowImpl = "auto") -> Tensor:
    """Return x with random elements set to zero and the others divided by 1 - dropout_p.

    Args:
        x: [..., d], floating point, any strides; all leading dimensions are flattened to rows.
        dropout_p: the probability of dropping an element, in [0, 1); 0 returns x.
        seed: int64 of one element on x's device; needed if dropout_p > 0. Each call in a step needs
            its own seed, since equal seeds drop equal elements.
        impl: "auto", "reference", "triton" (CUDA tensors) or "cpp" (CPU tensors).

    Returns:
        [..., d] of x's dtype.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device; the message names it.
        RuntimeError: the implementation is not available here; the message gives the reason.
    """
    if not isinstance(x, Tensor) or x.dim() == 0 or not x.is_floating_point():
        raise ValueError(f"x must be floating point of shape [..., d], got {describe(x)}")
    check_dropout(dropout_p, seed, x.device)
    kernels = _kernels(select("dropout", impl, x))
    if dropout_p == 0 or x.numel() == 0:
        return x
    rows = x.reshape(-1, x.shape[-1])
    if kernels is None:
        return reference.dropout(rows, dropout_p, seed).view(x.shape)
    return _Dropout.apply(rows, dropout_p, seed, kernels).view(x.shape)


def dropout_into(out: Tensor, rows: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
    """Write dropout(rows) into `out` and return `out`; not differentiable.

    rows, out: [N, d]; they may be the same tensor.
    """
    if select("dropout", "auto", rows) == "cpp":
        return cpp.dropout(rows, dropout_p, seed, out=out)
    return out.copy_(dropout(rows, dropout_p, seed))


def _kernels(impl: str) -> ModuleType | None:
    """Return the module of an implementation, None for the reference."""
    match impl:
        case "cpp":
            return cpp
        case "triton":
            from fastmtl_kernels.dropout import triton

            return triton
        case _:
            return None


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
