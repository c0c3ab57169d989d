"""Residual LayerNorm by the C++ kernels of csrc/add_layer_norm_cpu.cpp.

float32, bfloat16 and float16 rows; float32 inside. Rows of another dtype than the residual's are converted first.
What dropout drops is kept for backward, a bit for an element: on CPUs drawing it again takes as long as all the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastmtl_kernels.cast import cast
from fastmtl_kernels.philox import keep_threshold

if TYPE_CHECKING:
    from fastmtl_kernels.add_layer_norm.api import RowNorm


def forward(
    residual: Tensor,
    x: Tensor,
    ts: Tensor | None,
    x_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    call: RowNorm,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """y and z [N, d] of residual's dtype, mean and rstd [N] float32, and the bits of what dropout drops; all but y only
    as far as rows have tasks.
    """
    num_rows, num_columns = residual.shape
    y = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    # A row of z is read before y's is written: where nobody needs z, it shares y's memory.
    z = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device) if call.saves else y
    mean, rstd = (torch.empty(num_rows, dtype=torch.float32, device=residual.device) for _ in range(2))
    mask = None
    if call.saves and seed is not None:
        mask = torch.empty(num_rows, -(-num_columns // 64) * 8, dtype=torch.uint8, device=residual.device)
    torch.ops.fastmtl.add_layer_norm_out(
        residual.contiguous(),
        cast(x, residual.dtype).contiguous(),
        None if ts is None else cast(ts, residual.dtype).contiguous(),
        None if x_bias is None else cast(x_bias, torch.float32).contiguous(),
        cast(weight, torch.float32).contiguous(),
        cast(bias, torch.float32).contiguous(),
        seed,
        keep_threshold(call.dropout_p),
        1 / (1 - call.dropout_p),
        call.eps,
        call.tasks.host[-1],
        y,
        z,
        mean,
        rstd,
        mask,
    )
    return y, z, mean, rstd, mask


def recompute(z: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, call: RowNorm) -> Tensor:
    """y [N, d] of forward, bit for bit, from what it kept."""
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
    num_sums: int,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """dz and dx [N, d]; sums, the gradients of weight, bias and x_bias: float32 [3, T, d] for a sink, without one
    [3, 1, d] over all tasks.

    dx_dtype: None where dx is not wanted. num_sums: how many of the three are wanted; all are made.
    """
    dz = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    dx = None if mask is None else torch.empty(z.shape, dtype=z.dtype, device=z.device)
    totals = torch.empty(3, call.tasks.num_tasks, z.shape[1], dtype=torch.float32, device=z.device)
    torch.ops.fastmtl.add_layer_norm_backward_out(
        cast(dy, z.dtype).contiguous(),
        z,
        mean,
        rstd,
        cast(weight, torch.float32).contiguous(),
        mask,
        1 / (1 - call.dropout_p),
        call.tasks.offsets,
        dz,
        dx,
        totals,
    )
    if dx_dtype is not None:
        dx = cast(dz if dx is None else dx, dx_dtype)
    if call.sink is None and call.tasks.num_tasks > 1:  # all three at once
        totals = totals.sum(1, keepdim=True)
    return dz, dx, totals
