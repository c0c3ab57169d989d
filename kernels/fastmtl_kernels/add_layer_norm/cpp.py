"""Residual LayerNorm by the C++ kernels of csrc/add_layer_norm_cpu.cpp.

The elements that dropout drops are kept for backward, one bit each: on CPUs drawing them again
takes as long as all other work.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl_kernels.cast import cast
from fastmtl_kernels.layer_norm import cpp as layer_norm
from fastmtl_kernels.layer_norm.common import RowNorm


def forward(
    residual: Tensor,
    x: Tensor,
    ts: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    call: RowNorm,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Return y and z [N, d] of residual's dtype, mean and rstd [N] float32, and the dropped bits.

    z, mean, rstd and the bits are written for rows that have tasks only.
    """
    num_rows, num_columns = residual.shape
    mask = None
    if call.saves and seed is not None:
        mask = torch.empty(num_rows, -(-num_columns // 64) * 8, dtype=torch.uint8, device=residual.device)
    return *layer_norm.forward(residual, x, ts, weight, bias, seed, mask, call), mask


def recompute(z: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, call: RowNorm) -> Tensor:
    """Return forward's y [N, d], bit for bit, from the tensors that it kept."""
    y = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    weight, bias = (cast(parameter, torch.float32).contiguous() for parameter in (weight, bias))
    torch.ops.fastmtl.layer_norm_again_out(z, mean, rstd, weight, bias, call.tasks.host[-1], y)
    return y


def backward(
    dy: Tensor,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    call: RowNorm,
    *,
    dx_dtype: torch.dtype | None,
    want_sums: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return dz and dx [N, d] and the gradients of weight and bias, as of layer_norm.cpp.backward.

    dx_dtype: None where dx is not wanted. want_sums: no effect, as the kernel always computes them.
    """
    dz, dx, sums = layer_norm.backward(dy, z, mean, rstd, weight, mask, call)
    if dx_dtype is not None:
        dx = cast(dz if dx is None else dx, dx_dtype)
    return dz, dx, sums
