"""LayerNorm of residual + dropout(x) + ts by the C++ kernels of csrc/add_layer_norm_cpu.cpp.

ts [N, d] is the summand of the adapters, added without dropout.

float32, bfloat16 and float16 rows; arithmetic in float32. If x or ts has another dtype than
residual, it is converted before the kernel runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl_kernels.cast import cast
from fastmtl_kernels.layer_norm.common import RowNorm
from fastmtl_kernels.philox import keep_threshold


def forward(
    residual: Tensor,
    x: Tensor | None,
    ts: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    mask: Tensor | None,
    call: RowNorm,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y and z [N, d] of residual's dtype, and mean and rstd [N] float32.

    z is residual itself if there is neither x nor ts. Rows of no task are zeros in y, and in z if
    it is a sum; they are undefined in mean and rstd. mask: uint8 [N, 8 ceil(d / 64)], which
    receives the dropout mask, one bit per element; None if it is not needed.
    """
    num_rows = residual.shape[0]
    y = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    residual = residual.contiguous()
    if x is None and ts is None:
        z = residual
    elif call.saves or call.returns_sum:
        z = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    else:
        # The kernel reads a row of z before it writes that row of y, so both can share memory if no
        # backward needs z and z is no result.
        z = y
    mean, rstd = (torch.empty(num_rows, dtype=torch.float32, device=residual.device) for _ in range(2))
    torch.ops.fastmtl.add_layer_norm_out(
        residual,
        None if x is None else cast(x, residual.dtype).contiguous(),
        None if ts is None else cast(ts, residual.dtype).contiguous(),
        cast(weight, torch.float32).contiguous(),
        None if bias is None else cast(bias, torch.float32).contiguous(),
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
    return y, z, mean, rstd


def backward(
    dy: Tensor,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    call: RowNorm,
    dsum: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return dz and dx [N, d] and the gradients of weight and bias.

    dx is None if there is no dropout mask, since it then equals dz. The gradients are one float32
    tensor with weight's first: [2, T, d], one per task, if there is a sink; else [2, 1, d], summed
    over all tasks. dsum: the gradient of z, where z is a result as well.
    """
    dz = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    dx = None if mask is None else torch.empty(z.shape, dtype=z.dtype, device=z.device)
    totals = torch.empty(2, call.tasks.num_tasks, z.shape[1], dtype=torch.float32, device=z.device)
    torch.ops.fastmtl.add_layer_norm_backward_out(
        cast(dy, z.dtype).contiguous(),
        None if dsum is None else cast(dsum, z.dtype).contiguous(),
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
    if call.sink is None and call.tasks.num_tasks > 1:
        totals = totals.sum(1, keepdim=True)  # the gradients of weight and of bias in one call
    return dz, dx, totals
