"""Gated feed-forward activation: the product of one half of each row and gelu of the other half.

    a, b = the halves of x      y = gelu(a) b      da = dy b gelu'(a)      db = dy gelu(a)

    gelu(a) = a Phi(a), Phi the normal distribution function, or by the tanh formula
    gelu(a) = a / 2 (1 + tanh(sqrt(2 / pi) (a + 0.044715 a^3)))

x, dx [N, 2 f]; a, b, y, dy [N, f]. Arithmetic in float32. Only x is kept for backward. An
implementation is a module with `forward` and `backward`. Equal inputs give equal bits. Not
differentiable twice.

Sources: Hendrycks and Gimpel, Gaussian Error Linear Units, 2016; Shazeer, GLU Variants Improve
Transformer, 2020.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastmtl_kernels.checks import describe
from fastmtl_kernels.dispatch import RowImpl, select
from fastmtl_kernels.geglu import cpp, reference

Approximate = Literal["none", "tanh"]


def geglu(x: Tensor, *, approximate: Approximate = "none", impl: RowImpl = "auto") -> Tensor:
    """Return gelu(a) b, where a is the left half of each row of x and b the right half.

    Args:
        x: [..., 2 f], floating point, any strides; all leading dimensions are flattened to rows.
        approximate: "none" (by the error function) or "tanh", as in torch.nn.functional.gelu.
        impl: "auto", "reference", "triton" (CUDA tensors) or "cpp" (CPU tensors).

    Returns:
        [..., f] of x's dtype.

    Raises:
        ValueError: an argument has the wrong shape, dtype or value; the message names it.
        RuntimeError: the implementation is not available here; the message gives the reason.
    """
    if not isinstance(x, Tensor) or x.dim() == 0 or not x.is_floating_point():
        raise ValueError(f"x must be floating point of shape [..., 2 f], got {describe(x)}")
    if x.shape[-1] == 0 or x.shape[-1] % 2:
        raise ValueError(f"x must have an even number of columns, at least 2, got {describe(x)}")
    if approximate not in get_args(Approximate):
        raise ValueError(f"approximate must be 'none' or 'tanh', got {approximate!r}")
    kernels = _kernels(select("geglu", impl, x))
    if kernels is None:
        return reference.geglu(x, approximate)
    rows = x.reshape(-1, x.shape[-1])
    return _Geglu.apply(rows, approximate, kernels).view(*x.shape[:-1], x.shape[-1] // 2)


def _kernels(impl: str) -> ModuleType | None:
    """Return the module of an implementation, None for the reference."""
    match impl:
        case "cpp":
            return cpp
        case "triton":
            from fastmtl_kernels.geglu import triton

            return triton
        case _:
            return None


class _Geglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, approximate: str, kernels: ModuleType) -> Tensor:
        ctx.save_for_backward(x)
        ctx.approximate, ctx.kernels = approximate, kernels
        return kernels.forward(x, approximate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return ctx.kernels.backward(dy, x, ctx.approximate), None, None
