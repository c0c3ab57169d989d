"""Pooling over packed sequences by the C++ kernels of csrc/pool_cpu.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

_MODES = ("cls", "mean", "max")


def forward(x: Tensor, cu_seqlens: Tensor, mode: str) -> tuple[Tensor, Tensor | None]:
    """Return out [B, d] of x's dtype, and the row of x that each maximum comes from.

    The rows are int32 [B, d]; None unless mode is "max".
    """
    shape = len(cu_seqlens) - 1, x.shape[1]
    out = torch.empty(shape, dtype=x.dtype, device=x.device)
    winners = torch.empty(shape, dtype=torch.int32, device=x.device) if mode == "max" else None
    torch.ops.fastmtl.pool_out(x.contiguous(), cu_seqlens.contiguous(), _MODES.index(mode), out, winners)
    return out, winners


def backward(dout: Tensor, cu_seqlens: Tensor, winners: Tensor | None, mode: str, num_rows: int) -> Tensor:
    """Return dx [num_rows, d] of dout's dtype. winners: the rows that `forward` returned."""
    dx = torch.empty(num_rows, dout.shape[1], dtype=dout.dtype, device=dout.device)
    torch.ops.fastmtl.pool_backward_out(dout.contiguous(), cu_seqlens.contiguous(), _MODES.index(mode), winners, dx)
    return dx
