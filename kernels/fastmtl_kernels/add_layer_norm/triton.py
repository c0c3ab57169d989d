"""Residual LayerNorm by Triton.

    z = residual + dropout(x) + ts       y = (z - mean(z)) / sqrt(var(z) + eps) * weight + bias

residual, x, ts, y, z [num_rows, D] contiguous, each float32, float16 or bfloat16; weight, bias [D];
x, ts and bias may be None; mean, rstd [num_rows] float32; token_offsets [num_tasks + 1] int32.
Arithmetic in float32. A program keeps whole rows in registers, so each tensor is read or written
once. The kernels of backward are in fastmtl_kernels.layer_norm.triton.

Source: see fastmtl_kernels.add_layer_norm.reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmtl_kernels.dropout.triton import keep_rows
from fastmtl_kernels.layer_norm.common import RowNorm
from fastmtl_kernels.layer_norm.triton import backward, normalise
from fastmtl_kernels.philox import keep_threshold
from fastmtl_kernels.row_blocks import block_shape, load_rows

__all__ = ["backward", "forward", "recompute"]


@triton.jit(
    do_not_specialize=["num_rows", "num_tasks", "threshold"],
    do_not_specialize_on_alignment=["seed_ptr", "token_offsets_ptr", "mean_ptr", "rstd_ptr"],
)
def _add_layer_norm_fwd_kernel(
    residual_ptr: tl.tensor,
    x_ptr: tl.tensor,
    ts_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    token_offsets_ptr: tl.tensor,
    y_ptr: tl.tensor,
    z_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    rstd_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_tasks: tl.tensor,
    threshold: tl.tensor,
    keep_scale: tl.tensor,
    eps: tl.tensor,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_X: tl.constexpr,
    HAS_TS: tl.constexpr,
    DROPOUT: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = rows < tl.load(token_offsets_ptr + num_tasks)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    mask = mask_m[:, None] & mask_d[None, :]
    offs = rows.to(tl.int64)[:, None] * D + offs_d[None, :]
    written = (rows < num_rows)[:, None] & mask_d[None, :]
    z = load_rows(residual_ptr, offs, mask)
    if HAS_X:
        x = load_rows(x_ptr, offs, mask)
        if DROPOUT:
            x = tl.where(keep_rows(seed_ptr, rows, 0, threshold, BLOCK_D), x * keep_scale, 0.0)
        z += x
    if HAS_TS:
        z += load_rows(ts_ptr, offs, mask)
    if HAS_X or HAS_TS:
        tl.store(z_ptr + offs, z.to(z_ptr.dtype.element_ty), mask=written)
        z = z.to(z_ptr.dtype.element_ty).to(tl.float32)
    y, mean, rstd = normalise(z, weight_ptr, bias_ptr, eps, D, BLOCK_D, HAS_BIAS)
    tl.store(mean_ptr + rows, mean, mask=mask_m)
    tl.store(rstd_ptr + rows, rstd, mask=mask_m)
    y = tl.where(mask_m[:, None], y, 0.0).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + offs, y, mask=written)


@triton.jit(
    do_not_specialize=["num_rows", "num_tasks"],
    do_not_specialize_on_alignment=["token_offsets_ptr", "mean_ptr", "rstd_ptr"],
)
def _layer_norm_recompute_kernel(
    z_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    rstd_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    token_offsets_ptr: tl.tensor,
    y_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_tasks: tl.tensor,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = rows < tl.load(token_offsets_ptr + num_tasks)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    offs = rows.to(tl.int64)[:, None] * D + offs_d[None, :]
    z = load_rows(z_ptr, offs, mask_m[:, None] & mask_d[None, :])
    mean = tl.load(mean_ptr + rows, mask=mask_m, other=0.0)
    rstd = tl.load(rstd_ptr + rows, mask=mask_m, other=0.0)
    weight = load_rows(weight_ptr, offs_d, mask_d)
    # The same expressions as in `normalise`, so that y has the same bits.
    y = (z - mean[:, None]) * rstd[:, None] * weight[None, :]
    if HAS_BIAS:
        y += load_rows(bias_ptr, offs_d, mask_d)[None, :]
    y = tl.where(mask_m[:, None], y, 0.0).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + offs, y, mask=(rows < num_rows)[:, None] & mask_d[None, :])


def forward(
    residual: Tensor,
    x: Tensor | None,
    ts: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    call: RowNorm,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Return y and z [N, d] of residual's dtype, mean and rstd [N] float32, and the seed.

    z is residual itself if there is neither x nor ts. Rows of no task are zeros in y, and in z if
    it is a sum; they are undefined in mean and rstd. Backward draws the dropout mask again from the
    seed.
    """
    num_rows, num_columns = residual.shape
    residual = residual.contiguous()
    y = torch.empty(num_rows, num_columns, dtype=residual.dtype, device=residual.device)
    z = residual if x is None and ts is None else torch.empty_like(y)
    mean, rstd = torch.empty(2, num_rows, dtype=torch.float32, device=residual.device)
    shape = block_shape(num_columns)
    if num_rows:
        with torch.cuda.device_of(residual):
            _add_layer_norm_fwd_kernel[(triton.cdiv(num_rows, shape["BLOCK_M"]),)](
                residual_ptr=residual,
                x_ptr=None if x is None else x.contiguous(),
                ts_ptr=None if ts is None else ts.contiguous(),
                weight_ptr=weight.contiguous(),
                bias_ptr=None if bias is None else bias.contiguous(),
                seed_ptr=seed,
                token_offsets_ptr=call.tasks.offsets,
                y_ptr=y,
                z_ptr=z,
                mean_ptr=mean,
                rstd_ptr=rstd,
                num_rows=num_rows,
                num_tasks=call.tasks.num_tasks,
                threshold=keep_threshold(call.dropout_p),
                keep_scale=1 / (1 - call.dropout_p),
                eps=call.eps,
                D=num_columns,
                HAS_BIAS=bias is not None,
                HAS_X=x is not None,
                HAS_TS=ts is not None,
                DROPOUT=seed is not None,
                **shape,
            )
    return y, z, mean, rstd, seed


def recompute(z: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor | None, call: RowNorm) -> Tensor:
    """Return the y [N, d] that forward returned, bit for bit, from the tensors that it kept."""
    num_rows, num_columns = z.shape
    y = torch.empty_like(z)
    shape = block_shape(num_columns)
    if num_rows:
        with torch.cuda.device_of(z):
            _layer_norm_recompute_kernel[(triton.cdiv(num_rows, shape["BLOCK_M"]),)](
                z_ptr=z,
                mean_ptr=mean,
                rstd_ptr=rstd,
                weight_ptr=weight.contiguous(),
                bias_ptr=None if bias is None else bias.contiguous(),
                token_offsets_ptr=call.tasks.offsets,
                y_ptr=y,
                num_rows=num_rows,
                num_tasks=call.tasks.num_tasks,
                D=num_columns,
                HAS_BIAS=bias is not None,
                **shape,
            )
    return y
