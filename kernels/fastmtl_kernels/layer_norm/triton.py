"""LayerNorm and its backward by Triton, shared by add_layer_norm and embed_layer_norm.

    h = (z - mean(z)) rstd,  rstd = 1 / sqrt(var + eps)     y = h weight + bias
    dz = rstd (g - mean(g) - h mean(g h)),  g = dy weight    dweight = sum dy h, dbias = sum dy

dy, z, dz, dx [num_rows, D] contiguous, each float32, float16 or bfloat16; weight, bias [D]; mean,
rstd [num_rows] float32; token_offsets [num_tasks + 1] int32. Arithmetic in float32.

The gradients of weight and bias are summed over groups of tasks: each task is a group if there is a
sink, else all tasks are one group. Each program has an equal chunk of consecutive rows, so programs
have equal work even if tasks do not. A program sums the gradients over the part of each group that
lies in its chunk, and stores the sum of part (program p, group g) in slot p + g of the partial
sums. Walking along the rows, each new part starts either the next program or the next group, so
p + g is different for every part. A second kernel adds up the slots of each group in order, without
atomics: equal inputs give equal bits.

Source: see fastmtl_kernels.layer_norm.reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmtl_kernels.dropout.triton import keep_rows
from fastmtl_kernels.layer_norm.common import RowNorm
from fastmtl_kernels.philox import keep_threshold
from fastmtl_kernels.row_blocks import block_shape, load_rows

# The registers of the programs leave no room for more, and more would write more partial sums.
PROGRAMS_PER_MULTIPROCESSOR = 2
PER_THREAD = 8
# Blocks of rows that are loaded in advance, plus the one in use. With two programs per
# multiprocessor, three hide the latency of memory.
STAGES = 3
BLOCK_SLOTS = 32
BLOCK_COLUMNS = 64
# Two sums per column: the gradient of weight and that of bias.
_SUMS = tl.constexpr(2)


@triton.jit
def normalise(
    z: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    eps: tl.tensor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return y = LayerNorm(z) [BLOCK_M, BLOCK_D], and mean and rstd [BLOCK_M] of z.

    z: [BLOCK_M, BLOCK_D], float32, zero in columns from D on.
    """
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    mean = tl.sum(z, 1) / D
    centred = tl.where(mask_d[None, :], z - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)
    weight = load_rows(weight_ptr, offs_d, mask_d)
    y = centred * rstd[:, None] * weight[None, :]
    if HAS_BIAS:
        y += load_rows(bias_ptr, offs_d, mask_d)[None, :]
    return y, mean, rstd


@triton.jit(
    do_not_specialize=["num_rows", "num_groups", "group_size", "rows_per_program", "threshold"],
    do_not_specialize_on_alignment=["seed_ptr", "token_offsets_ptr", "mean_ptr", "rstd_ptr"],
)
def _add_layer_norm_bwd_kernel(
    dy_ptr: tl.tensor,
    dsum_ptr: tl.tensor,
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
    num_groups: tl.tensor,
    group_size: tl.tensor,  # in tasks
    rows_per_program: tl.tensor,
    threshold: tl.tensor,
    keep_scale: tl.tensor,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_SUM: tl.constexpr,
    WANT_SUMS: tl.constexpr,
    STORE_DX: tl.constexpr,
    DROP_X: tl.constexpr,
    DROP_Y: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, num_rows)
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    weight = load_rows(weight_ptr, offs_d, mask_d)
    for group in range(num_groups):
        begin = tl.maximum(first, tl.load(token_offsets_ptr + group * group_size))
        end = tl.minimum(last, tl.load(token_offsets_ptr + (group + 1) * group_size))
        if begin < end:
            dweight = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            dbias = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            for row in tl.range(begin, end, BLOCK_M, num_stages=STAGES):
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
                if HAS_SUM:
                    dz += load_rows(dsum_ptr, offs, mask)
                tl.store(dz_ptr + offs, dz.to(dz_ptr.dtype.element_ty), mask=mask)
                if DROP_X:
                    dz = tl.where(keep, dz * keep_scale, 0.0)
                if STORE_DX:
                    tl.store(dx_ptr + offs, dz.to(dx_ptr.dtype.element_ty), mask=mask)
                if WANT_SUMS:
                    dweight += dy * h
                    dbias += dy
            if WANT_SUMS:
                slot_ptr = partials_ptr + (program + group).to(tl.int64) * (_SUMS * D) + offs_d
                tl.store(slot_ptr, tl.sum(dweight, 0), mask=mask_d)
                tl.store(slot_ptr + D, tl.sum(dbias, 0), mask=mask_d)
    zeros = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    tail = tl.load(token_offsets_ptr + num_groups * group_size)
    for row in range(tl.maximum(first, tail), last, BLOCK_M):
        rows = row + offs_m
        mask = (rows < last)[:, None] & mask_d[None, :]
        offs = rows.to(tl.int64)[:, None] * D + offs_d[None, :]
        tl.store(dz_ptr + offs, zeros.to(dz_ptr.dtype.element_ty), mask=mask)
        if STORE_DX:
            tl.store(dx_ptr + offs, zeros.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["num_groups", "group_size", "rows_per_program"],
    do_not_specialize_on_alignment=["token_offsets_ptr"],
)
def _sum_slots_kernel(
    partials_ptr: tl.tensor,
    token_offsets_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    num_groups: tl.tensor,
    group_size: tl.tensor,
    rows_per_program: tl.tensor,
    D: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
) -> None:
    """Add up the partial sums of one group, for BLOCK_COLUMNS of the 2 D columns.

    The columns are the gradient of weight, then that of bias.
    """
    group = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    mask = columns < _SUMS * D
    begin = tl.load(token_offsets_ptr + group * group_size)
    end = tl.load(token_offsets_ptr + (group + 1) * group_size)
    total = tl.zeros([BLOCK_SLOTS, BLOCK_COLUMNS], tl.float32)
    if begin < end:
        last_slot = (end - 1) // rows_per_program + group
        for slot in range(begin // rows_per_program + group, last_slot + 1, BLOCK_SLOTS):
            slots = slot + tl.arange(0, BLOCK_SLOTS)
            offs = slots.to(tl.int64)[:, None] * (_SUMS * D) + columns[None, :]
            total += tl.load(partials_ptr + offs, mask=(slots <= last_slot)[:, None] & mask[None, :], other=0.0)
    out = (columns // D * num_groups + group).to(tl.int64) * D + columns % D
    tl.store(sums_ptr + out, tl.sum(total, 0).to(sums_ptr.dtype.element_ty), mask=mask)


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
    want_sums: bool,
    dsum: Tensor | None = None,
    drop_y: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return dz and dx [N, d] and the gradients of weight and bias.

    The gradients are one tensor with weight's first: float32 [2, T, d], one per task, if there is a
    sink; else [2, 1, d] of call.sums_dtype, summed over all tasks. Undefined if not want_sums.

    dx_dtype: dtype of dx; None if dx is not needed. seed: of dropout, or None. dsum: the gradient
    of z, where z is a result as well. drop_y: True if dropout was applied to y, False if to x.
    """
    num_rows, num_columns = z.shape
    num_groups, group_size = (1, call.tasks.num_tasks) if call.sink is None else (call.tasks.num_tasks, 1)
    sums_dtype = call.sums_dtype if call.sink is None else torch.float32
    dz = torch.empty_like(z)
    own_dx = dx_dtype is not None and (seed is not None or dx_dtype != z.dtype)
    dx = torch.empty_like(z, dtype=dx_dtype) if own_dx else None
    sums = torch.empty(_SUMS.value, num_groups, num_columns, dtype=sums_dtype, device=z.device)
    shape = block_shape(num_columns, PER_THREAD)
    programs = PROGRAMS_PER_MULTIPROCESSOR * _num_multiprocessors(z.device)
    rows_per_program = triton.cdiv(triton.cdiv(max(num_rows, 1), programs), shape["BLOCK_M"]) * shape["BLOCK_M"]
    programs = triton.cdiv(num_rows, rows_per_program)
    partials = torch.empty(
        programs + num_groups if want_sums else 0, _SUMS.value, num_columns, dtype=torch.float32, device=z.device
    )
    with torch.cuda.device_of(z):
        if num_rows:
            _add_layer_norm_bwd_kernel[(programs,)](
                dy_ptr=dy.contiguous(),
                dsum_ptr=None if dsum is None else dsum.contiguous(),
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
                num_groups=num_groups,
                group_size=group_size,
                rows_per_program=rows_per_program,
                threshold=keep_threshold(call.dropout_p),
                keep_scale=1 / (1 - call.dropout_p),
                D=num_columns,
                HAS_SUM=dsum is not None,
                WANT_SUMS=want_sums,
                STORE_DX=own_dx,
                DROP_X=seed is not None and not drop_y,
                DROP_Y=seed is not None and drop_y,
                STAGES=STAGES,
                # The registers per thread with PROGRAMS_PER_MULTIPROCESSOR programs. Without this
                # bound the assembler plans for more programs, and spills registers.
                maxnreg=255 if shape["num_warps"] <= 4 else 128,
                **shape,
            )
        if want_sums:
            _sum_slots_kernel[(num_groups, triton.cdiv(_SUMS.value * num_columns, BLOCK_COLUMNS))](
                partials_ptr=partials,
                token_offsets_ptr=call.tasks.offsets,
                sums_ptr=sums,
                num_groups=num_groups,
                group_size=group_size,
                rows_per_program=rows_per_program,
                D=num_columns,
                BLOCK_SLOTS=BLOCK_SLOTS,
                BLOCK_COLUMNS=BLOCK_COLUMNS,
                num_warps=4,
                enable_fp_fusion=True,
            )
    return dz, dx if own_dx else (None if dx_dtype is None else dz), sums


def _num_multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU.

    2 if `device` is no GPU: in Triton's interpreter and when kernels are compiled ahead of time.
    """
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
