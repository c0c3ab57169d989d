"""Residual LayerNorm by the C++ kernels of csrc/add_layer_norm_cpu.cpp.

The dropout mask is kept for backward, one bit per element: on CPUs, drawing the random numbers
again would take as long as all other work of backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl_kernels.cast import cast
from fastmtl_kernels.layer_norm import cpp as layer_norm
from fastmtl_kernels.layer_norm.common import RowNorm


def forward(
    residual: Tensor,
    x: Tensor | None,
    ts: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    call: RowNorm,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Return y and z [N, d] of residual's dtype, mean and rstd [N] float32, and the dropout mask.

    The mask is uint8 [N, 8 ceil(d / 64)], one bit per element; None if no backward follows or
    nothing is dropped. Rows of no task: see layer_norm.cpp.forward.
    """
    num_rows, num_columns = residual.shape
    mask = None
    if call.saves and seed is not None:
        mask = torch.empty(num_rows, -(-num_columns // 64) * 8, dtype=torch.uint8, device=residual.device)
    return *layer_norm.forward(residual, x, ts, weight, bias, seed, mask, call), mask


def recompute(z: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor | None, call: RowNorm) -> Tensor:
    """Return the y [N, d] that forward returned, bit for bit, from the tensors that it kept."""
    y = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    weight = cast(weight, torch.float32).contiguous()
    bias = None if bias is None else cast(bias, torch.float32).contiguous()
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
    dsum: Tensor | None = None,
    dx_dtype: torch.dtype | None,
    want_sums: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return dz and dx [N, d] and the gradients of weight and bias.

    The gradients have the shapes that layer_norm.cpp.backward gives them. dsum: the gradient of z,
    where z is a result as well. dx_dtype: the dtype of dx, None if dx is not needed. want_sums:
    whether the gradients of weight and bias are needed; it has no effect, as the kernel always
    computes them.
    """
    dz, dx, sums = layer_norm.backward(dy, z, mean, rstd, weight, mask, call, dsum)
    if dx_dtype is not None:
        dx = cast(dz if dx is None else dx, dx_dtype)
    return dz, dx, sums
