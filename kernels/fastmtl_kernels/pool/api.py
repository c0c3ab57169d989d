"""Pooling: one vector per sequence of a packed batch, the first, mean or maximum of its rows.

    cls   out[b] = x[s]                     dx[s] = dout[b]
    mean  out[b] = sum_r x[r] / (e - s)     dx[r] = dout[b] / (e - s)
    max   out[b] = max_r x[r]               dx[r] = dout[b] where r is the first row of the maximum

s = cu_seqlens[b], e = cu_seqlens[b + 1], s <= r < e. x, dx [N, d]; out, dout [B, d]; sums float32.
max is taken over each column by itself. An implementation is a module with `forward` and
`backward`. Every row of dx is written once: equal inputs give equal bits. Not differentiable twice.

Source: Reimers and Gurevych, Sentence-BERT, 2019, section 3.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastmtl_kernels.checks import describe
from fastmtl_kernels.dispatch import RowImpl, select
from fastmtl_kernels.pool import cpp, reference

PoolMode = Literal["cls", "mean", "max"]


def pool(x: Tensor, cu_seqlens: Tensor, *, mode: PoolMode = "cls", impl: RowImpl = "auto") -> Tensor:
    """Return one vector per sequence: its first row, or the mean or maximum of its rows.

    Args:
        x: [N, d], floating point, any strides. Rows past cu_seqlens[-1] belong to no sequence;
            their gradient is zero.
        cu_seqlens: [B + 1] int32 on x's device, ascending from 0 to at most N. The values are
            checked on CPUs only, as reading them would wait for a GPU. An empty sequence gives
            zeros.
        mode: "cls" (the first row), "mean" or "max".
        impl: "auto", "reference" (copies cu_seqlens to the host), "triton" (CUDA tensors) or "cpp"
            (CPU tensors).

    Returns:
        [B, d] of x's dtype.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or values; the message names it.
        RuntimeError: the implementation is not available here; the message gives the reason.
    """
    if not isinstance(x, Tensor) or x.dim() != 2 or x.shape[1] == 0 or not x.is_floating_point():
        raise ValueError(f"x must be floating point of shape [N, d], d >= 1, got {describe(x)}")
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
        raise ValueError(f"cu_seqlens must be an int32 tensor of shape [B + 1], got {describe(cu_seqlens)}")
    if cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens must be int32, got {cu_seqlens.dtype}; convert it with .int()")
    if cu_seqlens.device != x.device:
        raise ValueError(f"cu_seqlens must be on {x.device} like x, got {cu_seqlens.device}")
    if mode not in get_args(PoolMode):
        raise ValueError(f"mode must be 'cls', 'mean' or 'max', got {mode!r}")
    chosen = select("pool", impl, x)
    if x.device.type == "cpu" or chosen == "reference":
        offsets = cu_seqlens.tolist()
        if offsets[0] != 0 or offsets != sorted(offsets) or offsets[-1] > x.shape[0]:
            raise ValueError(f"cu_seqlens must ascend from 0 to at most the {x.shape[0]} rows of x, got {offsets}")
        if chosen == "reference":
            return reference.pool(x, offsets, mode)
    return _Pool.apply(x, cu_seqlens, mode, _kernels(chosen))


def _kernels(impl: str) -> ModuleType:
    """Return the module of an implementation other than the reference."""
    if impl == "triton":
        from fastmtl_kernels.pool import triton

        return triton
    return cpp


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cu_seqlens: Tensor, mode: str, kernels: ModuleType) -> Tensor:
        out, winners = kernels.forward(x, cu_seqlens, mode)
        ctx.save_for_backward(cu_seqlens, winners)
        ctx.num_rows, ctx.mode, ctx.kernels = x.shape[0], mode, kernels
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        cu_seqlens, winners = ctx.saved_tensors
        return ctx.kernels.backward(dout, cu_seqlens, winners, ctx.mode, ctx.num_rows), None, None, None
