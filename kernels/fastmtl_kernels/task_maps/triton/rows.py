"""One or two linear maps per task by Triton: the kernels of the rows, forward and backward.

x [num_rows, D_IN], h [num_rows, RANK], y [num_rows, D_OUT] contiguous; first [T, D_IN, RANK] and
second [T, RANK, D_OUT] dense in either order of their last two axes; token_offsets [T + 1] int32.
All tensors are float32, float16 or bfloat16; sums are float32, operands of tl.dot have the rows'
dtype. RANK is padded with zeros to a power of two, at least 16. fastmtl_kernels.task_maps.function
has the formulas.

A program processes a block of rows of one task. It finds the block from the offsets on the device,
so the host makes no table and does not wait. z [BLOCK_M, RANK] stays in registers between the two
maps, so x is read once and y written once. Rows of no task are treated as one more task, whose y
and dx are zeros.

Limits: RANK up to 256, in float32 up to 64. Equal inputs give equal bits.
Source: see fastmtl_kernels.task_maps.reference.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastmtl_kernels.dropout.triton import keep_rows
from fastmtl_kernels.task_maps.triton.common import activate, derive


@triton.jit
def _block_of_task(
    token_offsets_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_tasks: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return the task of this program, its first row, and the row past the task's last row.

    The task is num_tasks for rows of no task. A program that is left without rows gets a first row
    that is not less than the third result, so that its masks are empty.
    """
    offs_t = tl.arange(0, BLOCK_T)
    begins = tl.load(token_offsets_ptr + offs_t, mask=offs_t <= num_tasks, other=num_rows)
    ends = tl.load(token_offsets_ptr + offs_t + 1, mask=offs_t < num_tasks, other=num_rows)
    blocks = (ends - begins + BLOCK_M - 1) // BLOCK_M
    past = tl.cumsum(blocks, 0)
    program = tl.program_id(0)
    task = tl.sum((past <= program).to(tl.int32), 0)
    mine = offs_t == task
    first_row = tl.sum(tl.where(mine, begins + (program - past + blocks) * BLOCK_M, 0), 0)
    end = tl.sum(tl.where(mine, ends, 0), 0)
    return task, first_row, end


@triton.jit
def _store_zeros(
    ptr: tl.tensor,
    rows: tl.tensor,
    mask_m: tl.tensor,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    zeros = tl.zeros([BLOCK_M, BLOCK_D], ptr.dtype.element_ty)
    for column in range(0, D, BLOCK_D):
        offs_d = column + tl.arange(0, BLOCK_D)
        offs = rows.to(tl.int64)[:, None] * D + offs_d[None, :]
        tl.store(ptr + offs, zeros, mask=mask_m[:, None] & (offs_d < D)[None, :])


@triton.jit(
    do_not_specialize=["num_rows", "num_tasks"], do_not_specialize_on_alignment=["seed_ptr", "token_offsets_ptr"]
)
def maps_fwd_kernel(
    x_ptr: tl.tensor,
    first_ptr: tl.tensor,
    first_bias_ptr: tl.tensor,
    second_ptr: tl.tensor,
    second_bias_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    thresholds_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    token_offsets_ptr: tl.tensor,
    h_ptr: tl.tensor,
    y_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_tasks: tl.tensor,
    D_IN: tl.constexpr,
    RANK: tl.constexpr,
    D_OUT: tl.constexpr,
    FIRST_IN: tl.constexpr,  # strides of `first` and `second` along their last two axes
    FIRST_RANK: tl.constexpr,
    SECOND_RANK: tl.constexpr,
    SECOND_OUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    HAS_FIRST_BIAS: tl.constexpr,
    HAS_SECOND_BIAS: tl.constexpr,
    STORE_H: tl.constexpr,
    MIDDLE: tl.constexpr,
    LAST: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    task, first_row, end = _block_of_task(token_offsets_ptr, num_rows, num_tasks, BLOCK_M, BLOCK_T)
    rows = first_row + tl.arange(0, BLOCK_M)
    mask_m = rows < end
    rows_wide = rows.to(tl.int64)[:, None]
    if task < num_tasks:
        offs_r = tl.arange(0, BLOCK_R)
        mask_r = offs_r < RANK
        mask_h = mask_m[:, None] & mask_r[None, :]
        if HAS_FIRST:
            first_ptr += task.to(tl.int64) * (D_IN * RANK)
            h = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
            for column in range(0, D_IN, BLOCK_D):
                offs_d = column + tl.arange(0, BLOCK_D)
                mask_d = offs_d < D_IN
                x = tl.load(x_ptr + rows_wide * D_IN + offs_d[None, :], mask_m[:, None] & mask_d[None, :], 0.0)
                offs_w = offs_d[:, None] * FIRST_IN + offs_r[None, :] * FIRST_RANK
                w = tl.load(first_ptr + offs_w, mask_d[:, None] & mask_r[None, :], 0.0)
                h = tl.dot(x, w, h, input_precision=PRECISION)
            if HAS_FIRST_BIAS:
                h += tl.load(first_bias_ptr + task * RANK + offs_r, mask_r, 0.0).to(tl.float32)[None, :]
            if STORE_H:
                tl.store(h_ptr + rows_wide * RANK + offs_r[None, :], h.to(h_ptr.dtype.element_ty), mask_h)
            z = activate(h, MIDDLE).to(y_ptr.dtype.element_ty)
        else:
            z = tl.load(x_ptr + rows_wide * RANK + offs_r[None, :], mask_h, 0.0)
        second_ptr += task.to(tl.int64) * (RANK * D_OUT)
        for column in range(0, D_OUT, BLOCK_D):
            offs_d = column + tl.arange(0, BLOCK_D)
            mask_d = offs_d < D_OUT
            offs_w = offs_r[:, None] * SECOND_RANK + offs_d[None, :] * SECOND_OUT
            w = tl.load(second_ptr + offs_w, mask_r[:, None] & mask_d[None, :], 0.0)
            y = tl.dot(z, w, input_precision=PRECISION)
            if HAS_SECOND_BIAS:
                y += tl.load(second_bias_ptr + task * D_OUT + offs_d, mask_d, 0.0).to(tl.float32)[None, :]
            y = activate(y, LAST)
            if DROPOUT:
                kept = keep_rows(seed_ptr, rows, column, tl.load(thresholds_ptr + task), BLOCK_D)
                y = tl.where(kept, y * tl.load(scales_ptr + task), 0.0)
            offs = rows_wide * D_OUT + offs_d[None, :]
            tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask_m[:, None] & mask_d[None, :])
    else:
        _store_zeros(y_ptr, rows, mask_m, D_OUT, BLOCK_M, BLOCK_D)


@triton.jit(
    do_not_specialize=["num_rows", "num_tasks"], do_not_specialize_on_alignment=["seed_ptr", "token_offsets_ptr"]
)
def maps_bwd_kernel(
    dy_ptr: tl.tensor,
    h_ptr: tl.tensor,
    first_ptr: tl.tensor,
    second_ptr: tl.tensor,
    second_bias_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    thresholds_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    token_offsets_ptr: tl.tensor,
    z_ptr: tl.tensor,
    dlast_ptr: tl.tensor,
    dh_ptr: tl.tensor,
    dx_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_tasks: tl.tensor,
    D_IN: tl.constexpr,
    RANK: tl.constexpr,
    D_OUT: tl.constexpr,
    FIRST_IN: tl.constexpr,
    FIRST_RANK: tl.constexpr,
    SECOND_RANK: tl.constexpr,
    SECOND_OUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    HAS_SECOND_BIAS: tl.constexpr,
    STORE_DX: tl.constexpr,
    MIDDLE: tl.constexpr,
    LAST: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Store dx, and dh, the gradient of h (the output of the first map before `middle`).

    If `middle` is an activation, also store z = middle(h). If `last` is one, also store dlast, the
    gradient of its input.
    """
    task, first_row, end = _block_of_task(token_offsets_ptr, num_rows, num_tasks, BLOCK_M, BLOCK_T)
    rows = first_row + tl.arange(0, BLOCK_M)
    mask_m = rows < end
    rows_wide = rows.to(tl.int64)[:, None]
    if task < num_tasks:
        offs_r = tl.arange(0, BLOCK_R)
        mask_r = offs_r < RANK
        mask_h = mask_m[:, None] & mask_r[None, :]
        offs_h = rows_wide * RANK + offs_r[None, :]
        second_ptr += task.to(tl.int64) * (RANK * D_OUT)
        # z is stored before dh is computed, so that only one of them occupies registers.
        if MIDDLE != "identity":
            h = tl.load(h_ptr + offs_h, mask_h, 0.0).to(tl.float32)
            z = activate(h, MIDDLE).to(h_ptr.dtype.element_ty)
            tl.store(z_ptr + offs_h, z, mask_h)
        elif LAST != "identity":
            z = tl.load(h_ptr + offs_h, mask_h, 0.0)
        dh = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        for column in range(0, D_OUT, BLOCK_D):
            offs_d = column + tl.arange(0, BLOCK_D)
            mask_d = offs_d < D_OUT
            offs = rows_wide * D_OUT + offs_d[None, :]
            dy = tl.load(dy_ptr + offs, mask_m[:, None] & mask_d[None, :], 0.0)
            offs_w = offs_d[:, None] * SECOND_OUT + offs_r[None, :] * SECOND_RANK
            w = tl.load(second_ptr + offs_w, mask_d[:, None] & mask_r[None, :], 0.0)
            if DROPOUT:
                kept = keep_rows(seed_ptr, rows, column, tl.load(thresholds_ptr + task), BLOCK_D)
                dy = tl.where(kept, dy.to(tl.float32) * tl.load(scales_ptr + task), 0.0).to(dy.dtype)
            if LAST != "identity":
                y = tl.dot(z, w.T, input_precision=PRECISION)
                if HAS_SECOND_BIAS:
                    y += tl.load(second_bias_ptr + task * D_OUT + offs_d, mask_d, 0.0).to(tl.float32)[None, :]
                dy = derive(dy.to(tl.float32), y, LAST).to(dy.dtype)
                tl.store(dlast_ptr + offs, dy, mask_m[:, None] & mask_d[None, :])
            dh = tl.dot(dy, w, dh, input_precision=PRECISION)
        if HAS_FIRST:
            if MIDDLE != "identity":
                dh = derive(dh, tl.load(h_ptr + offs_h, mask_h, 0.0).to(tl.float32), MIDDLE)
            dh_rounded = dh.to(dh_ptr.dtype.element_ty)
            tl.store(dh_ptr + offs_h, dh_rounded, mask_h)
            if STORE_DX:
                first_ptr += task.to(tl.int64) * (D_IN * RANK)
                for column in range(0, D_IN, BLOCK_D):
                    offs_d = column + tl.arange(0, BLOCK_D)
                    mask_d = offs_d < D_IN
                    offs_w = offs_r[:, None] * FIRST_RANK + offs_d[None, :] * FIRST_IN
                    w = tl.load(first_ptr + offs_w, mask_r[:, None] & mask_d[None, :], 0.0)
                    dx = tl.dot(dh_rounded, w, input_precision=PRECISION).to(dx_ptr.dtype.element_ty)
                    offs = rows_wide * D_IN + offs_d[None, :]
                    tl.store(dx_ptr + offs, dx, mask_m[:, None] & mask_d[None, :])
        else:
            tl.store(dx_ptr + offs_h, dh.to(dx_ptr.dtype.element_ty), mask_h)
    elif STORE_DX:
        _store_zeros(dx_ptr, rows, mask_m, D_IN, BLOCK_M, BLOCK_D)
