"""One or two linear maps per task by Triton; the formulas are in fastmtl_kernels.task_maps.common.

x [num_rows, D_IN], h [num_rows, RANK], y [num_rows, D_OUT] contiguous; first [T, D_IN, RANK] and second [T, RANK,
D_OUT] dense in either order of their two axes; token_offsets [T + 1] int32. float32, float16 or bfloat16, all the same;
sums are float32, operands of the dots have the rows' dtype. RANK is padded with zeros to a power of two, 16 at least.

A program owns a block of rows of one task, which it finds from the offsets on the device: no table is made on the
host, nothing waits. It keeps its z [BLOCK_M, RANK] in registers between the two maps, so that x and y are moved once.
What is kept for backward is h, in the rows' dtype; y before `last` is computed again. Rows of no task are one more
segment, whose y and dx are zeros. Weight gradients: low_rank_weights_triton.

Limits: RANK up to 256, of float32 up to 64. Equal inputs give equal bits. Source: as
fastmtl_kernels.task_maps.reference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmtl_kernels.dropout.triton import keep_rows
from fastmtl_kernels.task_maps.common import dropout_table

if TYPE_CHECKING:
    from fastmtl_kernels.task_maps.common import Maps, Wants


@triton.jit
def activate(x: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    if ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    if ACTIVATION == "relu":
        x = tl.where(x < 0, 0.0, x)
    return x


@triton.jit
def derive(gradient: tl.tensor, x: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """gradient times the derivative of the activation at x."""
    if ACTIVATION == "gelu":
        gradient *= 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + 0.3989422804014327 * x * tl.exp(-0.5 * x * x)
    if ACTIVATION == "relu":
        gradient = tl.where(x > 0, gradient, 0.0)
    return gradient


@triton.jit
def _block_of_task(
    token_offsets_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_tasks: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The task of this program, num_tasks for rows of none, its first row, and the row past the task's last.

    Without rows left for it, the two are equal.
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
def _maps_fwd_kernel(
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
    FIRST_IN: tl.constexpr,  # strides of first and second along their columns of x, z and y
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
def _maps_bwd_kernel(
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
    """dx; dh, the gradient of h; where `middle` does anything, z; where `last` does, dlast, the gradient of what it is
    given.
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
        # Before dh takes its registers.
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


def dense(weight: Tensor) -> Tensor:
    """The weight [T, a, b] itself where its memory is [T, a, b] or [T, b, a] without gaps, else a copy."""
    return weight if weight.is_contiguous() or weight.mT.is_contiguous() else weight.contiguous()


def constants(x: Tensor, first: Tensor | None, second: Tensor, dropout: bool) -> dict[str, Any]:
    """What all kernels are compiled with, but for the shapes of their blocks."""
    rank, d_out = second.shape[1:]
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {
        "D_IN": x.shape[1],
        "RANK": rank,
        "D_OUT": d_out,
        "FIRST_IN": 0 if first is None else first.stride(1),
        "FIRST_RANK": 0 if first is None else first.stride(2),
        "SECOND_RANK": second.stride(1),
        "SECOND_OUT": second.stride(2),
        "HAS_FIRST": first is not None,
        "DROPOUT": dropout,
        # Three tensor core products in place of one give float32 back its digits.
        "PRECISION": "tf32x3" if x.dtype == torch.float32 and not allowed else "tf32",
        "BLOCK_R": max(16, triton.next_power_of_2(rank)),
        "enable_fp_fusion": True,
    }


def dropout_pointers(seed: Tensor | None, call: Maps, device: torch.device) -> dict[str, Tensor | None]:
    thresholds, scales = (None, None) if seed is None else dropout_table(call.rates, device)
    return {"seed_ptr": seed, "thresholds_ptr": thresholds, "scales_ptr": scales}


def _blocks(x: Tensor, rank: int, call: Maps, derives_last: bool = False) -> dict[str, Any]:
    """Shapes of the blocks that keep the kernels within registers and shared memory.

    derives_last: for backward, which then holds z and dh at once.
    """
    shape: dict[str, Any] = {"num_warps": 4 if rank <= 64 else 8}
    if x.dtype == torch.float32:
        shape |= {"BLOCK_M": 32, "BLOCK_D": 32, "num_stages": 2}
    elif derives_last and rank > 128:
        shape |= {"BLOCK_M": 64, "BLOCK_D": 32, "num_stages": 3}
    else:
        shape |= {"BLOCK_M": 64, "BLOCK_D": 64, "num_stages": 3 if rank <= 128 else 2}
    return shape | {"BLOCK_T": triton.next_power_of_2(call.tasks.num_tasks + 1)}


def _grid(num_rows: int, num_tasks: int, block_m: int) -> tuple[int]:
    """As many programs as the tasks and the rest can have blocks, however the rows are shared out."""
    return (num_rows // block_m + num_tasks + 1,)


def forward(
    x: Tensor,
    first: Tensor | None,
    first_bias: Tensor | None,
    second: Tensor,
    second_bias: Tensor | None,
    seed: Tensor | None,
    call: Maps,
) -> tuple[Tensor | None, ...]:
    """y [N, d_out]; h [N, r], None without a first map and where no backward may come."""
    num_rows, num_tasks = x.shape[0], call.tasks.num_tasks
    rank, d_out = second.shape[1:]
    y = torch.empty(num_rows, d_out, dtype=x.dtype, device=x.device)
    store_h = first is not None and call.saves
    h = torch.empty(num_rows, rank, dtype=x.dtype, device=x.device) if store_h else None
    first, second = None if first is None else dense(first), dense(second)
    shape = _blocks(x, rank, call)
    if num_rows:
        with torch.cuda.device_of(x):
            _maps_fwd_kernel[_grid(num_rows, num_tasks, shape["BLOCK_M"])](
                x_ptr=x.contiguous(),
                first_ptr=first,
                first_bias_ptr=None if first_bias is None else first_bias.contiguous(),
                second_ptr=second,
                second_bias_ptr=None if second_bias is None else second_bias.contiguous(),
                token_offsets_ptr=call.tasks.offsets,
                h_ptr=h,
                y_ptr=y,
                num_rows=num_rows,
                num_tasks=num_tasks,
                HAS_FIRST_BIAS=first_bias is not None,
                HAS_SECOND_BIAS=second_bias is not None,
                STORE_H=store_h,
                MIDDLE=call.middle,
                LAST=call.last,
                **dropout_pointers(seed, call, x.device),
                **constants(x, first, second, seed is not None),
                **shape,
            )
    return y, h


def backward(
    dy: Tensor,
    x: Tensor,
    first: Tensor | None,
    second: Tensor,
    second_bias: Tensor | None,
    seed: Tensor | None,
    h: Tensor | None,
    *,
    call: Maps,
    wants: Wants,
) -> tuple[Tensor | None, ...]:
    """The gradients of x, first, first_bias, second and second_bias, None where not wanted."""
    from fastmtl_kernels.task_maps.triton.weights import weight_gradients

    num_rows, num_tasks = x.shape[0], call.tasks.num_tasks
    x, dy = x.contiguous(), dy.contiguous()
    store_dx = wants.x or first is None
    dx = torch.empty_like(x) if store_dx else None
    dh = None if h is None else torch.empty_like(h)
    z = None if h is None or call.middle == "identity" else torch.empty_like(h)
    dlast = None if call.last == "identity" else torch.empty_like(dy)
    dense_first, dense_second = None if first is None else dense(first), dense(second)
    shape = _blocks(x, second.shape[1], call, derives_last=call.last != "identity")
    if num_rows:
        with torch.cuda.device_of(x):
            _maps_bwd_kernel[_grid(num_rows, num_tasks, shape["BLOCK_M"])](
                dy_ptr=dy,
                h_ptr=x if h is None else h,
                first_ptr=dense_first,
                second_ptr=dense_second,
                second_bias_ptr=None if second_bias is None else second_bias.contiguous(),
                token_offsets_ptr=call.tasks.offsets,
                z_ptr=z,
                dlast_ptr=dlast,
                dh_ptr=dh,
                dx_ptr=dx,
                num_rows=num_rows,
                num_tasks=num_tasks,
                HAS_SECOND_BIAS=second_bias is not None,
                STORE_DX=store_dx,
                MIDDLE=call.middle,
                LAST=call.last,
                **dropout_pointers(seed, call, x.device),
                **constants(x, dense_first, dense_second, seed is not None),
                **shape,
            )
    if not any(wants[1:]):
        return dx, None, None, None, None
    if dlast is not None:  # in which dropout is done
        dy, seed = dlast, None
    if z is None:
        z = x if h is None else h
    gradients = weight_gradients(x, dy, z, dh, dense_first, dense_second, seed, call, wants)
    return dx if wants.x else None, *gradients
