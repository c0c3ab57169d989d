"""combined_adamw in Triton, for NVIDIA GPUs.

    g = sum_t weights[t] J[t], then AdamW's step with g (fastmtl_kernels.combined_adamw.reference)

J [T, P] is T lists of K tensors in float32, bfloat16 or float16, at any address; weights and
moments are float32, the copy of the weights is bfloat16 or float16. Arithmetic in float32; square
root and division round as torch rounds them.

Hundreds of tensors are updated by one launch per combination of dtypes. For this, one table on the
device lists the addresses of the tensors, and another lists the pieces of tensors, one per program.
Both tables depend only on the addresses and are cached, so a step at the same addresses copies
nothing to the device. Tensors that are aligned to 16 bytes are read and written with vector
instructions. No limits on T, K and P.

Source: see fastmtl_kernels.combined_adamw.reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmtl_kernels.combined_adamw.reference import Update, Written

# Tasks whose columns are loaded together.
MAX_ROWS = 8
NUM_WARPS = 4
BLOCK = 1024
VECTOR_BYTES = 16
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# Arguments that change with the step. Triton must not specialise the kernel on their values.
CHANGING = ["decay", "beta1_left", "beta2", "beta2_left", "step_size", "root", "eps"]


@triton.jit
def _update(
    merged: tl.tensor,
    param_ptrs: tl.tensor,
    exp_avg_ptrs: tl.tensor,
    exp_avg_sq_ptrs: tl.tensor,
    mask: tl.tensor,
    decay: tl.tensor,
    beta1_left: tl.tensor,
    beta2: tl.tensor,
    beta2_left: tl.tensor,
    step_size: tl.tensor,
    root: tl.tensor,
    eps: tl.tensor,
) -> tl.tensor:
    """Store AdamW's step of one block. Return the new weights, so that the caller can copy them.

    merged: the weighted sum of the task gradients.
    """
    m = tl.load(exp_avg_ptrs, mask=mask)
    v = tl.load(exp_avg_sq_ptrs, mask=mask)
    p = tl.load(param_ptrs, mask=mask)
    m += beta1_left * (merged - m)
    v = beta2 * v + beta2_left * merged * merged
    p = decay * p - tl.div_rn(step_size * m, tl.sqrt_rn(v) * root + eps)
    tl.store(exp_avg_ptrs, m, mask=mask)
    tl.store(exp_avg_sq_ptrs, v, mask=mask)
    tl.store(param_ptrs, p, mask=mask)
    return p


@triton.jit
def _pointer(entry_ptr: tl.tensor, begin: tl.tensor, TYPE: tl.constexpr, ALIGNED: tl.constexpr) -> tl.tensor:
    """Return a pointer to element `begin` of the tensor whose address is stored at entry_ptr."""
    pointer = tl.load(entry_ptr).to(tl.pointer_type(TYPE)) + begin
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _update_block(
    entry_ptr: tl.tensor,
    begin: tl.tensor,
    weights_ptr: tl.tensor,
    mask: tl.tensor,
    decay: tl.tensor,
    beta1_left: tl.tensor,
    beta2: tl.tensor,
    beta2_left: tl.tensor,
    step_size: tl.tensor,
    root: tl.tensor,
    eps: tl.tensor,
    GRAD: tl.constexpr,
    COPY: tl.constexpr,
    ALIGNED: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    offs = tl.arange(0, BLOCK)
    merged = tl.zeros([BLOCK], tl.float32)
    for t in tl.static_range(NUM_ROWS):
        if t % MAX_ROWS == 0 and t > 0:
            # The barrier keeps the compiler from loading more rows ahead than fit in registers.
            tl.debug_barrier()
        row = tl.load(_pointer(entry_ptr + t, begin, GRAD, ALIGNED) + offs, mask=mask)
        merged += tl.load(weights_ptr + t) * row.to(tl.float32)
    p = _update(
        merged,
        _pointer(entry_ptr + NUM_ROWS, begin, tl.float32, ALIGNED) + offs,
        _pointer(entry_ptr + NUM_ROWS + 1, begin, tl.float32, ALIGNED) + offs,
        _pointer(entry_ptr + NUM_ROWS + 2, begin, tl.float32, ALIGNED) + offs,
        mask,
        decay,
        beta1_left,
        beta2,
        beta2_left,
        step_size,
        root,
        eps,
    )
    if COPY is not None:
        tl.store(_pointer(entry_ptr + NUM_ROWS + 3, begin, COPY, ALIGNED) + offs, p.to(COPY), mask=mask)


@triton.jit(do_not_specialize=CHANGING)
def _combined_adamw_kernel(
    table_ptr: tl.tensor,
    pieces_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    decay: tl.tensor,
    beta1_left: tl.tensor,
    beta2: tl.tensor,
    beta2_left: tl.tensor,
    step_size: tl.tensor,
    root: tl.tensor,
    eps: tl.tensor,
    GRAD: tl.constexpr,
    COPY: tl.constexpr,
    ALIGNED: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Update BLOCK columns of one tensor.

    table: int64 [K, NUM_ROWS + 5]; row k has the addresses of the gradients (one per task), of the
    weight, its two moments and its copy, then the number of elements. pieces: int64 [programs, 2];
    the index k of a program's tensor, and the first column of its block.
    """
    piece = tl.program_id(0)
    begin = tl.load(pieces_ptr + 2 * piece + 1)
    entry_ptr = table_ptr + tl.load(pieces_ptr + 2 * piece) * (NUM_ROWS + 5)
    left = tl.load(entry_ptr + NUM_ROWS + 4) - begin
    # A full block has no mask that depends on data, since such a mask prevents vector loads.
    if left >= BLOCK:
        _update_block(
            entry_ptr, begin, weights_ptr, None, decay, beta1_left, beta2, beta2_left, step_size,
            root, eps, GRAD, COPY, ALIGNED, NUM_ROWS, MAX_ROWS, BLOCK,
        )  # fmt: skip
    else:
        _update_block(
            entry_ptr, begin, weights_ptr, tl.arange(0, BLOCK) < left, decay, beta1_left, beta2, beta2_left, step_size,
            root, eps, GRAD, COPY, ALIGNED, NUM_ROWS, MAX_ROWS, BLOCK,
        )  # fmt: skip


@triton.jit(do_not_specialize=CHANGING)
def _combined_adamw_rows_kernel(
    row_ptrs: tl.tuple,
    weights_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    param_ptr: tl.tensor,
    exp_avg_ptr: tl.tensor,
    exp_avg_sq_ptr: tl.tensor,
    copy_ptr: tl.tensor,
    width: tl.tensor,
    decay: tl.tensor,
    beta1_left: tl.tensor,
    beta2: tl.tensor,
    beta2_left: tl.tensor,
    step_size: tl.tensor,
    root: tl.tensor,
    eps: tl.tensor,
    NUM_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Update BLOCK columns of one row of an embedding table."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < width
    present = offs < tl.where(slot >= 0, width, 0)
    merged = tl.zeros([BLOCK], tl.float32)
    for t in tl.static_range(NUM_ROWS):
        gradient = tl.load(row_ptrs[t] + slot * width + offs, mask=present, other=0.0)
        merged += tl.load(weights_ptr + t) * gradient.to(tl.float32)
    offs_table = row * width + offs
    p = _update(
        merged,
        param_ptr + offs_table,
        exp_avg_ptr + offs_table,
        exp_avg_sq_ptr + offs_table,
        mask,
        decay,
        beta1_left,
        beta2,
        beta2_left,
        step_size,
        root,
        eps,
    )
    if copy_ptr is not None:
        tl.store(copy_ptr + offs_table, p.to(copy_ptr.dtype.element_ty), mask=mask)


def combined_adamw(
    grads: Sequence[Sequence[Tensor]],
    weights: Tensor,
    targets: Sequence[Written],
    update: Update,
    slots: Tensor | None,
) -> None:
    with torch.cuda.device_of(weights):
        weights = weights.float().contiguous()
        if slots is not None:
            _launch_rows([row for (row,) in grads], weights, targets[0], update, slots)
            return
        alike: dict[tuple[torch.dtype, torch.dtype | None, bool], list[int]] = {}
        for k, target in enumerate(targets):
            tensors = [task[k] for task in grads] + [tensor for tensor in target if tensor is not None]
            aligned = all(tensor.data_ptr() % VECTOR_BYTES == 0 for tensor in tensors)
            if target.param.numel():
                copied = None if target.copy is None else target.copy.dtype
                alike.setdefault((grads[0][k].dtype, copied, aligned), []).append(k)
        for (dtype, copied, aligned), chosen in alike.items():
            rows = tuple(_addresses([task[k] for task in grads], targets[k]) for k in chosen)
            table, pieces = _tables(rows, BLOCK, weights.device)
            _combined_adamw_kernel[(len(pieces),)](
                table_ptr=table,
                pieces_ptr=pieces,
                weights_ptr=weights,
                **update._asdict(),
                GRAD=TYPES[dtype],
                COPY=None if copied is None else TYPES[copied],
                ALIGNED=aligned,
                NUM_ROWS=len(grads),
                MAX_ROWS=MAX_ROWS,
                BLOCK=BLOCK,
                num_warps=NUM_WARPS,
                enable_fp_fusion=True,
            )


def _addresses(gradients: Sequence[Tensor], target: Written) -> tuple[int, ...]:
    copy = 0 if target.copy is None else target.copy.data_ptr()
    pointers = [tensor.data_ptr() for tensor in (*gradients, *target[:3])]
    return (*pointers, copy, target.param.numel())


@lru_cache(maxsize=64)
def _tables(rows: tuple[tuple[int, ...], ...], block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the tables `table` and `pieces` of _combined_adamw_kernel, on the device.

    rows: the rows of `table`. block: columns per piece.
    """
    pieces = [(k, begin) for k, row in enumerate(rows) for begin in range(0, row[-1], block)]
    table, parts = (torch.tensor(numbers, dtype=torch.int64) for numbers in (rows, pieces))
    if device.type == "cuda":
        table, parts = table.pin_memory(), parts.pin_memory()
    return table.to(device, non_blocking=True), parts.to(device, non_blocking=True)


def _launch_rows(rows: Sequence[Tensor], weights: Tensor, target: Written, update: Update, slots: Tensor) -> None:
    num_rows, width = target.param.shape
    if num_rows == 0 or width == 0:
        return
    block = min(triton.next_power_of_2(width), BLOCK)
    _combined_adamw_rows_kernel[(num_rows, triton.cdiv(width, block))](
        row_ptrs=tuple(rows),
        weights_ptr=weights,
        slots_ptr=slots.contiguous(),
        param_ptr=target.param,
        exp_avg_ptr=target.exp_avg,
        exp_avg_sq_ptr=target.exp_avg_sq,
        copy_ptr=target.copy,
        width=width,
        **update._asdict(),
        NUM_ROWS=len(rows),
        BLOCK=block,
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )
