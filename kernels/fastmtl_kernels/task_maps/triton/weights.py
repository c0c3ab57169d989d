"""Gradients of the weights and biases of one or two linear maps per task, by Triton.

    dsecond_t = z^T dy    dsecond_bias_t = sum dy    over the rows of task t
    dfirst_t  = x^T dh    dfirst_bias_t  = sum dh    z = x without a first map

x [num_rows, D_IN], dy [num_rows, D_OUT], z and dh [num_rows, RANK] contiguous, of one dtype; if
there is a seed, dropout is applied to dy here. Sums are float32; results have the dtype and the
strides of the parameters.

The rows are cut into equal chunks, so programs have equal work even if tasks do not. A program has
a chunk and BLOCK_D columns of dy or of x. It stores the sums over the rows of task t in its chunk
in slot chunk + t of the partial sums. Walking along the rows, each new part starts either the next
chunk or the next task, so chunk + t is different for every part. A slot has the gradients of the
parameters one after the other, in their layouts. A second kernel adds up the slots of each task in
order, without atomics: equal inputs give equal bits.

Source: see fastmtl_kernels.task_maps.reference.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmtl_kernels.dropout.triton import keep_rows
from fastmtl_kernels.task_maps.common import Maps, Wants
from fastmtl_kernels.task_maps.triton.common import constants, dropout_pointers

# Enough programs to occupy the device; more chunks would write more partial sums.
PROGRAMS_PER_MULTIPROCESSOR = 2
# Least rows of a chunk. For fewer rows, writing the partial sums would cost more than it saves.
MIN_CHUNK = 256
BLOCK_SLOTS = 16
BLOCK_COLUMNS = 256


@triton.jit
def _outer_product(
    wide_ptr: tl.tensor,
    narrow_ptr: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    column: tl.tensor,
    seed_ptr: tl.tensor,
    threshold: tl.tensor,
    keep_scale: tl.tensor,
    D: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DROPOUT: tl.constexpr,
    SUM_WIDE: tl.constexpr,
    SUM_NARROW: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return wide^T narrow [BLOCK_D, BLOCK_R] over the rows begin:end.

    Also return the sum of wide (zeros if not SUM_WIDE) and of narrow (zeros if not SUM_NARROW) over
    these rows.
    """
    offs_d = column + tl.arange(0, BLOCK_D)
    offs_r = tl.arange(0, BLOCK_R)
    mask_d = offs_d < D
    mask_r = offs_r < RANK
    product = tl.zeros([BLOCK_D, BLOCK_R], tl.float32)
    wide_sum = tl.zeros([BLOCK_D], tl.float32)
    narrow_sum = tl.zeros([BLOCK_R], tl.float32)
    for row in range(begin, end, BLOCK_K):
        rows = row + tl.arange(0, BLOCK_K)
        mask_k = rows < end
        rows_wide = rows.to(tl.int64)[:, None]
        wide = tl.load(wide_ptr + rows_wide * D + offs_d[None, :], mask_k[:, None] & mask_d[None, :], 0.0)
        narrow = tl.load(narrow_ptr + rows_wide * RANK + offs_r[None, :], mask_k[:, None] & mask_r[None, :], 0.0)
        if DROPOUT:
            kept = keep_rows(seed_ptr, rows, column, threshold, BLOCK_D)
            wide = tl.where(kept, wide.to(tl.float32) * keep_scale, 0.0).to(wide.dtype)
        if SUM_NARROW:
            narrow_sum += tl.sum(narrow.to(tl.float32), 0)
        if SUM_WIDE:
            wide_sum += tl.sum(wide.to(tl.float32), 0)
        product = tl.dot(wide.T, narrow, product, input_precision=PRECISION)
    return product, wide_sum, narrow_sum


@triton.jit(
    do_not_specialize=["num_rows", "num_tasks", "rows_per_chunk"],
    do_not_specialize_on_alignment=["seed_ptr", "token_offsets_ptr"],
)
def _weights_kernel(
    x_ptr: tl.tensor,
    dy_ptr: tl.tensor,
    z_ptr: tl.tensor,
    dh_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    thresholds_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    token_offsets_ptr: tl.tensor,
    partials_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_tasks: tl.tensor,
    rows_per_chunk: tl.tensor,
    D_IN: tl.constexpr,
    RANK: tl.constexpr,
    D_OUT: tl.constexpr,
    FIRST_IN: tl.constexpr,
    FIRST_RANK: tl.constexpr,
    SECOND_RANK: tl.constexpr,
    SECOND_OUT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SLOT: tl.constexpr,  # the size of a slot, and the first element of each parameter in it
    SECOND_BIAS: tl.constexpr,
    FIRST: tl.constexpr,
    FIRST_BIAS: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    chunk = tl.program_id(0)
    first_row = chunk * rows_per_chunk
    last_row = tl.minimum(first_row + rows_per_chunk, num_rows)
    tile = tl.program_id(1)
    OUT_TILES: tl.constexpr = (D_OUT + BLOCK_D - 1) // BLOCK_D
    offs_r = tl.arange(0, BLOCK_R)
    mask_r = offs_r < RANK
    for t in range(num_tasks):
        begin = tl.maximum(first_row, tl.load(token_offsets_ptr + t))
        end = tl.minimum(last_row, tl.load(token_offsets_ptr + t + 1))
        slot_ptr = partials_ptr + (chunk + t).to(tl.int64) * SLOT
        if begin < end:
            threshold = 0
            keep_scale = 1.0
            if DROPOUT:
                threshold = tl.load(thresholds_ptr + t)
                keep_scale = tl.load(scales_ptr + t)
            if tile < OUT_TILES:
                product, dy_sum, _z_sum = _outer_product(
                    dy_ptr, z_ptr, begin, end, tile * BLOCK_D, seed_ptr, threshold, keep_scale, D_OUT, RANK,
                    BLOCK_K, BLOCK_D, BLOCK_R, DROPOUT, FIRST > SECOND_BIAS, False, PRECISION,
                )  # fmt: skip
                offs_d = tile * BLOCK_D + tl.arange(0, BLOCK_D)
                mask_d = offs_d < D_OUT
                offs = offs_d[:, None] * SECOND_OUT + offs_r[None, :] * SECOND_RANK
                tl.store(slot_ptr + offs, product, mask_d[:, None] & mask_r[None, :])
                if FIRST > SECOND_BIAS:
                    tl.store(slot_ptr + SECOND_BIAS + offs_d, dy_sum, mask_d)
            elif HAS_FIRST:
                column = (tile - OUT_TILES) * BLOCK_D
                product, _x_sum, dh_sum = _outer_product(
                    x_ptr, dh_ptr, begin, end, column, seed_ptr, threshold, keep_scale, D_IN, RANK,
                    BLOCK_K, BLOCK_D, BLOCK_R, False, False, SLOT > FIRST_BIAS, PRECISION,
                )  # fmt: skip
                offs_d = column + tl.arange(0, BLOCK_D)
                mask_d = offs_d < D_IN
                offs = FIRST + offs_d[:, None] * FIRST_IN + offs_r[None, :] * FIRST_RANK
                tl.store(slot_ptr + offs, product, mask_d[:, None] & mask_r[None, :])
                if SLOT > FIRST_BIAS:
                    if column == 0:
                        tl.store(slot_ptr + FIRST_BIAS + offs_r, dh_sum, mask_r)


@triton.jit(do_not_specialize=["rows_per_chunk"], do_not_specialize_on_alignment=["token_offsets_ptr"])
def _sum_slots_kernel(
    partials_ptr: tl.tensor,
    token_offsets_ptr: tl.tensor,
    dsecond_ptr: tl.tensor,
    dsecond_bias_ptr: tl.tensor,
    dfirst_ptr: tl.tensor,
    dfirst_bias_ptr: tl.tensor,
    rows_per_chunk: tl.tensor,
    SLOT: tl.constexpr,
    SECOND_BIAS: tl.constexpr,
    FIRST: tl.constexpr,
    FIRST_BIAS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
) -> None:
    task = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    mask = columns < SLOT
    begin = tl.load(token_offsets_ptr + task)
    end = tl.load(token_offsets_ptr + task + 1)
    total = tl.zeros([BLOCK_SLOTS, BLOCK_COLUMNS], tl.float32)
    if begin < end:
        last_slot = (end - 1) // rows_per_chunk + task
        for slot in range(begin // rows_per_chunk + task, last_slot + 1, BLOCK_SLOTS):
            slots = slot + tl.arange(0, BLOCK_SLOTS)
            offs = slots.to(tl.int64)[:, None] * SLOT + columns[None, :]
            total += tl.load(partials_ptr + offs, (slots <= last_slot)[:, None] & mask[None, :], 0.0)
    sums = tl.sum(total, 0).to(dsecond_ptr.dtype.element_ty)
    wide_task = task.to(tl.int64)
    tl.store(dsecond_ptr + wide_task * SECOND_BIAS + columns, sums, columns < SECOND_BIAS)
    if FIRST > SECOND_BIAS:
        offs = wide_task * (FIRST - SECOND_BIAS) + columns - SECOND_BIAS
        tl.store(dsecond_bias_ptr + offs, sums, (columns >= SECOND_BIAS) & (columns < FIRST))
    if FIRST_BIAS > FIRST:
        offs = wide_task * (FIRST_BIAS - FIRST) + columns - FIRST
        tl.store(dfirst_ptr + offs, sums, (columns >= FIRST) & (columns < FIRST_BIAS))
    if SLOT > FIRST_BIAS:
        offs = wide_task * (SLOT - FIRST_BIAS) + columns - FIRST_BIAS
        tl.store(dfirst_bias_ptr + offs, sums, (columns >= FIRST_BIAS) & mask)


def weight_gradients(
    x: Tensor,
    dy: Tensor,
    z: Tensor,
    dh: Tensor | None,
    first: Tensor | None,
    second: Tensor,
    seed: Tensor | None,
    call: Maps,
    wants: Wants,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of first, first_bias, second and second_bias, None if not needed.

    x and dy must be contiguous, first and second dense; dh is None without a first map. seed: None
    if dy has passed dropout already, or if there is no dropout.
    """
    num_rows, num_tasks = x.shape[0], call.tasks.num_tasks
    rank, d_out = second.shape[1:]
    dsecond = torch.empty_like(second)
    dfirst = None if first is None else torch.empty_like(first)
    dsecond_bias = torch.empty(num_tasks, d_out, dtype=x.dtype, device=x.device) if wants.second_bias else None
    dfirst_bias = torch.empty(num_tasks, rank, dtype=x.dtype, device=x.device) if wants.first_bias else None
    common = constants(x, first, second, seed is not None)
    slot = _slot(x.shape[1] if first is not None else 0, rank, d_out, wants)
    shape = _blocks(x, rank)
    tiles = triton.cdiv(d_out, shape["BLOCK_D"]) + (0 if first is None else triton.cdiv(x.shape[1], shape["BLOCK_D"]))
    chunks = triton.cdiv(PROGRAMS_PER_MULTIPROCESSOR * _num_multiprocessors(x.device), tiles)
    rows_per_chunk = max(triton.cdiv(num_rows, chunks), MIN_CHUNK)
    chunks = triton.cdiv(num_rows, rows_per_chunk)
    partials = torch.empty(chunks + num_tasks, slot["SLOT"], dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        if num_rows:
            _weights_kernel[(chunks, tiles)](
                x_ptr=x,
                dy_ptr=dy,
                z_ptr=z,
                dh_ptr=dh,
                token_offsets_ptr=call.tasks.offsets,
                partials_ptr=partials,
                num_rows=num_rows,
                num_tasks=num_tasks,
                rows_per_chunk=rows_per_chunk,
                **dropout_pointers(seed, call, x.device),
                **common,
                **slot,
                **shape,
            )
        _sum_slots_kernel[(num_tasks, triton.cdiv(slot["SLOT"], BLOCK_COLUMNS))](
            partials_ptr=partials,
            token_offsets_ptr=call.tasks.offsets,
            dsecond_ptr=dsecond,
            dsecond_bias_ptr=dsecond_bias,
            dfirst_ptr=dfirst,
            dfirst_bias_ptr=dfirst_bias,
            rows_per_chunk=rows_per_chunk,
            BLOCK_SLOTS=BLOCK_SLOTS,
            BLOCK_COLUMNS=BLOCK_COLUMNS,
            num_warps=4,
            enable_fp_fusion=True,
            **slot,
        )
    return dfirst if wants.first else None, dfirst_bias, dsecond if wants.second else None, dsecond_bias


def _slot(d_in: int, rank: int, d_out: int, wants: Wants) -> dict[str, int]:
    """Return the number of elements of a slot, and the position of each gradient in it.

    The gradients are those of second, second_bias, first and first_bias, in this order.
    """
    second_bias = d_out * rank
    first = second_bias + (d_out if wants.second_bias else 0)
    first_bias = first + d_in * rank
    size = first_bias + (rank if wants.first_bias else 0)
    return {"SLOT": size, "SECOND_BIAS": second_bias, "FIRST": first, "FIRST_BIAS": first_bias}


def _blocks(x: Tensor, rank: int) -> dict[str, Any]:
    """Return block shapes with which the kernel fits in registers and shared memory of sm_80."""
    if x.dtype == torch.float32:
        return {"BLOCK_K": 32, "BLOCK_D": 32, "num_warps": 4 if rank <= 64 else 8, "num_stages": 2}
    # With dropout, 64 rows and ranks above 128, Triton 3.6 spills registers on sm_90.
    return {"BLOCK_K": 64 if rank <= 128 else 32, "BLOCK_D": 64, "num_warps": 4 if rank <= 64 else 8, "num_stages": 3}


def _num_multiprocessors(device: torch.device) -> int:
    """Return a GPU's number of multiprocessors; 2 for the interpreter and ahead-of-time builds."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
