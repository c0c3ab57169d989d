"""Residual LayerNorm by Triton; the formulas are in fastmtl_kernels.add_layer_norm.

residual, x, ts, y, z [num_rows, D] contiguous; float32, float16 or bfloat16 each; weight, bias, x_bias [D]; mean, rstd
[num_rows] float32; token_offsets [num_tasks + 1] int32. Everything is float32 in registers. A program holds whole rows,
so each tensor is read and written once.

Backward's programs own equal chunks of consecutive rows, so tasks of unequal size cost no balance. A program adds up
the parameters' gradients over its part of each task; program p's part of task t is slot p + t of the partial sums,
since along the rows one of the two grows with every part. A second kernel adds up the slots of each task in their
order: no atomics, equal inputs give equal bits.

Source: as fastmtl_kernels.add_layer_norm_reference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmtl_kernels.dropout_triton import block_shape, keep_rows
from fastmtl_kernels.philox import keep_threshold

if TYPE_CHECKING:
    from fastmtl_kernels.add_layer_norm import RowNorm

# Of backward: as many as have room with their registers; more would write more partial sums.
PROGRAMS_PER_MULTIPROCESSOR = 2
BWD_PER_THREAD = 8
BLOCK_SLOTS = 32
BLOCK_COLUMNS = 64


@triton.jit
def load_rows(ptr: tl.tensor, offs: tl.tensor, mask: tl.tensor) -> tl.tensor:
    return tl.load(ptr + offs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def normalise(
    z: tl.tensor, weight_ptr: tl.tensor, bias_ptr: tl.tensor, eps: tl.tensor, D: tl.constexpr, BLOCK_D: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """LayerNorm of z [BLOCK_M, BLOCK_D], zeros past its D columns; the rows' mean and 1 / sqrt(variance + eps)."""
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    mean = tl.sum(z, 1) / D
    centred = tl.where(mask_d[None, :], z - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)
    weight = load_rows(weight_ptr, offs_d, mask_d)
    bias = load_rows(bias_ptr, offs_d, mask_d)
    return centred * rstd[:, None] * weight[None, :] + bias[None, :], mean, rstd


@triton.jit(do_not_specialize=["num_rows", "num_tasks", "threshold"])
def _add_layer_norm_fwd_kernel(
    residual_ptr: tl.tensor,
    x_ptr: tl.tensor,
    ts_ptr: tl.tensor,
    x_bias_ptr: tl.tensor,
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
    HAS_TS: tl.constexpr,
    HAS_X_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = rows < tl.load(token_offsets_ptr + num_tasks)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    mask = mask_m[:, None] & mask_d[None, :]
    offs = rows.to(tl.int64)[:, None] * D + offs_d[None, :]
    x = load_rows(x_ptr, offs, mask)
    if HAS_X_BIAS:
        x += load_rows(x_bias_ptr, offs_d, mask_d)[None, :]
    if DROPOUT:
        x = tl.where(keep_rows(seed_ptr, rows, 0, threshold, BLOCK_D), x * keep_scale, 0.0)
    z = load_rows(residual_ptr, offs, mask) + x
    if HAS_TS:
        z += load_rows(ts_ptr, offs, mask)
    tl.store(z_ptr + offs, z.to(z_ptr.dtype.element_ty), mask=mask)
    y, mean, rstd = normalise(z.to(z_ptr.dtype.element_ty).to(tl.float32), weight_ptr, bias_ptr, eps, D, BLOCK_D)
    tl.store(mean_ptr + rows, mean, mask=mask_m)
    tl.store(rstd_ptr + rows, rstd, mask=mask_m)
    y = tl.where(mask_m[:, None], y, 0.0).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + offs, y, mask=(rows < num_rows)[:, None] & mask_d[None, :])


@triton.jit(do_not_specialize=["num_rows", "num_tasks", "rows_per_program", "threshold"])
def _add_layer_norm_bwd_kernel(
    dy_ptr: tl.tensor,
    z_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    rstd_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    token_offsets_ptr: tl.tensor,
    dz_ptr: tl.tensor,
    dx_ptr: tl.tensor,
    partials_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_tasks: tl.tensor,
    rows_per_program: tl.tensor,
    threshold: tl.tensor,
    keep_scale: tl.tensor,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_SUMS: tl.constexpr,  # 0, 2 for weight and bias, 3 for x_bias too
    STORE_DX: tl.constexpr,
    DROP_X: tl.constexpr,
    DROP_Y: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, num_rows)
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    weight = load_rows(weight_ptr, offs_d, mask_d)
    for t in range(num_tasks):
        begin = tl.maximum(first, tl.load(token_offsets_ptr + t))
        end = tl.minimum(last, tl.load(token_offsets_ptr + t + 1))
        if begin < end:
            dweight = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            dbias = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            dx_bias = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            for row in range(begin, end, BLOCK_M):
                rows = row + offs_m
                mask_m = rows < end
                mask = mask_m[:, None] & mask_d[None, :]
                offs = rows.to(tl.int64)[:, None] * D + offs_d[None, :]
                dy = load_rows(dy_ptr, offs, mask)
                z = load_rows(z_ptr, offs, mask)
                mean = tl.load(mean_ptr + rows, mask=mask_m, other=0.0)
                rstd = tl.load(rstd_ptr + rows, mask=mask_m, other=0.0)
                if DROP_X or DROP_Y:
                    keep = keep_rows(seed_ptr, rows, 0, threshold, BLOCK_D)
                if DROP_Y:
                    dy = tl.where(keep, dy * keep_scale, 0.0)
                h = tl.where(mask, (z - mean[:, None]) * rstd[:, None], 0.0)
                g = dy * weight[None, :]
                dz = (g - (tl.sum(g, 1) / D)[:, None] - h * (tl.sum(g * h, 1) / D)[:, None]) * rstd[:, None]
                tl.store(dz_ptr + offs, dz.to(dz_ptr.dtype.element_ty), mask=mask)
                if DROP_X:
                    dz = tl.where(keep, dz * keep_scale, 0.0)
                if STORE_DX:
                    tl.store(dx_ptr + offs, dz.to(dx_ptr.dtype.element_ty), mask=mask)
                if NUM_SUMS > 0:
                    dweight += dy * h
                    dbias += dy
                if NUM_SUMS > 2:
                    dx_bias += tl.where(mask, dz, 0.0)
            slot_ptr = partials_ptr + (program + t).to(tl.int64) * (NUM_SUMS * D) + offs_d
            if NUM_SUMS > 0:
                tl.store(slot_ptr, tl.sum(dweight, 0), mask=mask_d)
                tl.store(slot_ptr + D, tl.sum(dbias, 0), mask=mask_d)
            if NUM_SUMS > 2:
                tl.store(slot_ptr + 2 * D, tl.sum(dx_bias, 0), mask=mask_d)
    zeros = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for row in range(tl.maximum(first, tl.load(token_offsets_ptr + num_tasks)), last, BLOCK_M):
        rows = row + offs_m
        mask = (rows < last)[:, None] & mask_d[None, :]
        offs = rows.to(tl.int64)[:, None] * D + offs_d[None, :]
        tl.store(dz_ptr + offs, zeros.to(dz_ptr.dtype.element_ty), mask=mask)
        if STORE_DX:
            tl.store(dx_ptr + offs, zeros.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tasks", "rows_per_program"])
def _sum_slots_kernel(
    partials_ptr: tl.tensor,
    token_offsets_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    num_tasks: tl.tensor,
    rows_per_program: tl.tensor,
    D: tl.constexpr,
    NUM_SUMS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
) -> None:
    task = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    mask = columns < NUM_SUMS * D
    begin = tl.load(token_offsets_ptr + task)
    end = tl.load(token_offsets_ptr + task + 1)
    total = tl.zeros([BLOCK_SLOTS, BLOCK_COLUMNS], tl.float32)
    if begin < end:
        last_slot = (end - 1) // rows_per_program + task
        for slot in range(begin // rows_per_program + task, last_slot + 1, BLOCK_SLOTS):
            slots = slot + tl.arange(0, BLOCK_SLOTS)
            offs = slots.to(tl.int64)[:, None] * (NUM_SUMS * D) + columns[None, :]
            total += tl.load(partials_ptr + offs, mask=(slots <= last_slot)[:, None] & mask[None, :], other=0.0)
    out = (columns // D * num_tasks + task).to(tl.int64) * D + columns % D
    tl.store(sums_ptr + out, tl.sum(total, 0), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "num_tasks"])
def _layer_norm_again_kernel(
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
    bias = load_rows(bias_ptr, offs_d, mask_d)
    # The same expression as in `normalise`: what is made again has the bits that it had.
    y = (z - mean[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]
    y = tl.where(mask_m[:, None], y, 0.0).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + offs, y, mask=(rows < num_rows)[:, None] & mask_d[None, :])


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
    """y and z [N, d] of residual's dtype, mean and rstd [N] float32, and the seed, from which backward draws again; z,
    mean and rstd only as far as rows have tasks.
    """
    num_rows, num_columns = residual.shape
    y, z = (torch.empty(num_rows, num_columns, dtype=residual.dtype, device=residual.device) for _ in range(2))
    mean, rstd = torch.empty(2, num_rows, dtype=torch.float32, device=residual.device)
    shape = block_shape(num_columns)
    if num_rows:
        with torch.cuda.device_of(residual):
            _add_layer_norm_fwd_kernel[(triton.cdiv(num_rows, shape["BLOCK_M"]),)](
                residual_ptr=residual.contiguous(),
                x_ptr=x.contiguous(),
                ts_ptr=None if ts is None else ts.contiguous(),
                x_bias_ptr=None if x_bias is None else x_bias.contiguous(),
                weight_ptr=weight.contiguous(),
                bias_ptr=bias.contiguous(),
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
                HAS_TS=ts is not None,
                HAS_X_BIAS=x_bias is not None,
                DROPOUT=seed is not None,
                **shape,
            )
    return y, z, mean, rstd, seed


def again(z: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, call: RowNorm) -> Tensor:
    """y [N, d] of forward, bit for bit, from what it kept."""
    num_rows, num_columns = z.shape
    y = torch.empty_like(z)
    shape = block_shape(num_columns)
    if num_rows:
        with torch.cuda.device_of(z):
            _layer_norm_again_kernel[(triton.cdiv(num_rows, shape["BLOCK_M"]),)](
                z_ptr=z,
                mean_ptr=mean,
                rstd_ptr=rstd,
                weight_ptr=weight.contiguous(),
                bias_ptr=bias.contiguous(),
                token_offsets_ptr=call.tasks.offsets,
                y_ptr=y,
                num_rows=num_rows,
                num_tasks=call.tasks.num_tasks,
                D=num_columns,
                **shape,
            )
    return y


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
    num_sums: int,
    drop_y: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """dz and dx [N, d], sums [num_sums, T, d] float32: the tasks' gradients of weight, bias and x_bias.

    dx_dtype: None where dx is not wanted. num_sums: 0, 2 (without x_bias) or 3. drop_y: dropout is that of y, not of x.
    """
    num_rows, num_columns = z.shape
    num_tasks = call.tasks.num_tasks
    dz = torch.empty_like(z)
    own_dx = dx_dtype is not None and (seed is not None or dx_dtype != z.dtype)
    dx = torch.empty_like(z, dtype=dx_dtype) if own_dx else None
    sums = torch.empty(num_sums, num_tasks, num_columns, dtype=torch.float32, device=z.device)
    shape = block_shape(num_columns, BWD_PER_THREAD)
    programs = PROGRAMS_PER_MULTIPROCESSOR * _num_multiprocessors(z.device)
    rows_per_program = triton.cdiv(triton.cdiv(max(num_rows, 1), programs), shape["BLOCK_M"]) * shape["BLOCK_M"]
    programs = triton.cdiv(num_rows, rows_per_program)
    partials = torch.empty(programs + num_tasks, num_sums, num_columns, dtype=torch.float32, device=z.device)
    with torch.cuda.device_of(z):
        if num_rows:
            _add_layer_norm_bwd_kernel[(programs,)](
                dy_ptr=dy.contiguous(),
                z_ptr=z,
                mean_ptr=mean,
                rstd_ptr=rstd,
                weight_ptr=weight.contiguous(),
                seed_ptr=seed,
                token_offsets_ptr=call.tasks.offsets,
                dz_ptr=dz,
                dx_ptr=dx,
                partials_ptr=partials,
                num_rows=num_rows,
                num_tasks=num_tasks,
                rows_per_program=rows_per_program,
                threshold=keep_threshold(call.dropout_p),
                keep_scale=1 / (1 - call.dropout_p),
                D=num_columns,
                NUM_SUMS=num_sums,
                STORE_DX=own_dx,
                DROP_X=seed is not None and not drop_y,
                DROP_Y=seed is not None and drop_y,
                **shape,
            )
        if num_sums:
            _sum_slots_kernel[(num_tasks, triton.cdiv(num_sums * num_columns, BLOCK_COLUMNS))](
                partials_ptr=partials,
                token_offsets_ptr=call.tasks.offsets,
                sums_ptr=sums,
                num_tasks=num_tasks,
                rows_per_program=rows_per_program,
                D=num_columns,
                NUM_SUMS=num_sums,
                BLOCK_SLOTS=BLOCK_SLOTS,
                BLOCK_COLUMNS=BLOCK_COLUMNS,
                num_warps=4,
                enable_fp_fusion=True,
            )
    return dz, dx if own_dx else (None if dx_dtype is None else dz), sums


def _num_multiprocessors(device: torch.device) -> int:
    """A few where there is no GPU: in the interpreter and in compilation ahead of time."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
