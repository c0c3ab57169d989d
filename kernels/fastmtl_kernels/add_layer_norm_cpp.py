"""Residual LayerNorm, embeddings and row-wise dropout by the C++ kernels of csrc/add_layer_norm_cpu.cpp.

float32, bfloat16 and float16 rows; float32 inside. Rows of another dtype than the residual's are converted first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmtl_kernels.philox import keep_threshold

if TYPE_CHECKING:
    from fastmtl_kernels.add_layer_norm import RowNorm


def forward(
    residual: Tensor,
    x: Tensor,
    ts: Tensor | None,
    x_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    call: RowNorm,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y and z [N, d] of residual's dtype, mean and rstd [N] float32; the last three only as far as rows have tasks."""
    num_rows = residual.shape[0]
    y, z = (torch.empty_like(residual, memory_format=torch.contiguous_format) for _ in range(2))
    mean, rstd = residual.new_empty(2, num_rows, dtype=torch.float32)
    torch.ops.fastmtl.add_layer_norm_out(
        residual.contiguous(),
        x.to(residual.dtype).contiguous(),
        None if ts is None else ts.to(residual.dtype).contiguous(),
        None if x_bias is None else x_bias.float().contiguous(),
        weight.float().contiguous(),
        bias.float().contiguous(),
        seed,
        keep_threshold(call.dropout_p),
        1 / (1 - call.dropout_p),
        call.eps,
        call.tasks.host[-1],
        y,
        z,
        mean,
        rstd,
    )
    return y, z, mean, rstd


def backward(
    dy: Tensor,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    call: RowNorm,
    *,
    dx_dtype: torch.dtype | None,
    sums: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """dz and dx [N, d], sums [3, T, d] float32: the tasks' gradients of weight, bias and x_bias.

    dx_dtype: None where dx is not wanted. sums: unused, they cost next to nothing here.
    """
    dz = torch.empty_like(z)
    dx = torch.empty_like(z) if seed is not None and dx_dtype is not None else None
    totals = z.new_empty(3, call.tasks.num_tasks, z.shape[1], dtype=torch.float32)
    torch.ops.fastmtl.add_layer_norm_backward_out(
        dy.to(z.dtype).contiguous(),
        z,
        mean,
        rstd,
        weight.float().contiguous(),
        seed,
        keep_threshold(call.dropout_p),
        1 / (1 - call.dropout_p),
        call.tasks.offsets,
        dz,
        dx,
        totals,
    )
    if dx_dtype is not None:
        dx = (dz if dx is None else dx).to(dx_dtype)
    return dz, dx, totals


def embed_forward(
    ids: tuple[Tensor, Tensor, Tensor],
    tables: tuple[Tensor, Tensor, Tensor],
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    call: RowNorm,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As forward, of the sum of three tables' rows, with dropout last."""
    words, positions, types = (F.embedding(index, table) for index, table in zip(ids, tables, strict=True))
    y, z, mean, rstd = forward(words, positions, types, None, weight, bias, None, call._replace(dropout_p=0.0))
    if seed is not None:
        _drop(y, call.dropout_p, seed, y)
    return y, z, mean, rstd


def embed_backward(
    dy: Tensor, z: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, seed: Tensor | None, call: RowNorm
) -> tuple[Tensor, Tensor]:
    """dz [N, d] and sums [2, T, d] float32: the tasks' gradients of weight and bias."""
    dh = dy if seed is None else dropout(dy, call.dropout_p, seed)
    plain = call._replace(dropout_p=0.0)
    dz, _, sums = backward(dh, z, mean, rstd, weight, None, plain, dx_dtype=None, sums=True)
    return dz, sums[:2]


def dropout(x: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
    """x [N, d] dropped out; also its own backward."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _drop(x.contiguous(), dropout_p, seed, out)
    return out


def _drop(x: Tensor, dropout_p: float, seed: Tensor, out: Tensor) -> None:
    torch.ops.fastmtl.row_dropout_out(x, seed, keep_threshold(dropout_p), 1 / (1 - dropout_p), out)
