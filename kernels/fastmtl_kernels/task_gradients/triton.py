"""Gramian and combination of task gradients by Triton.

Used on NVIDIA GPUs if the CUDA kernels of csrc/ are not built.

    gramian  G[i, j] = sum_p J[i, p] J[j, p]        float32 within a piece, float64 across pieces
    combine  out[p]  = sum_t weights[t] J[t, p]     float32

J [T, P] is T lists of one contiguous tensor each, of P numbers in float32, bfloat16 or float16, at
any address, such as the rows of a flat buffer. Rows that are aligned to 16 bytes are read with
vector instructions. For gramian, a program computes the partial sums of one piece of the columns,
and a second kernel adds up the pieces in a fixed order, without atomics: equal inputs give equal
bits. gramian reads J once for up to MAX_ROWS tasks. More tasks are divided into groups of GROUP,
and each pair of groups is processed by itself. No limits on T and P.

Source: see fastmtl_kernels.task_gradients.reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
import triton
import triton.language as tl
from torch import Tensor

# The most tasks whose inner products all fit in the registers of a thread.
MAX_ROWS = 8
GROUP = MAX_ROWS // 2
NUM_WARPS = 4
LANES = 32 * NUM_WARPS
# A piece of columns is read in STEPS steps, in each of which every lane reads one vector.
STEPS = 64
BLOCK_PIECES = 256


@triton.jit
def _add_products(
    sums: tl.tuple,
    row_ptrs: tl.tuple,
    begin: tl.tensor,
    offs: tl.tensor,
    mask: tl.tensor,
    NUM_ROWS: tl.constexpr,
    HAS_MASK: tl.constexpr,
) -> tl.tuple:
    """Return `sums` plus the products of the columns of one step.

    sums: a [LANES] for each pair of rows i <= j.
    """
    rows: tl.tuple = ()
    for i in tl.static_range(NUM_ROWS):
        if HAS_MASK:
            row = tl.load(row_ptrs[i] + begin + offs, mask=mask, other=0.0)
        else:
            row = tl.load(row_ptrs[i] + begin + offs)
        rows = rows + (row.to(tl.float32),)
    added: tl.tuple = ()
    for i in tl.static_range(NUM_ROWS):
        for j in tl.static_range(i, NUM_ROWS):
            entry_sums = sums[i * NUM_ROWS - i * (i - 1) // 2 + j - i]
            added = added + (entry_sums + tl.sum(rows[i] * rows[j], axis=1),)
    return added


@triton.jit(do_not_specialize=["num_columns", "num_pieces"])
def _gramian_kernel(
    row_ptrs: tl.tuple,
    partials_ptr: tl.tensor,
    num_columns: tl.tensor,
    num_pieces: tl.tensor,
    NUM_ROWS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    STEPS: tl.constexpr,
) -> None:
    """Store the partial sums of one piece of columns.

    partials: float32 [NUM_ROWS (NUM_ROWS + 1) / 2, num_pieces], one row per element of G's upper
    triangle, in row-major order.
    """
    STEP: tl.constexpr = LANES * VECTOR
    piece = tl.program_id(0)
    begin = piece.to(tl.int64) * (STEPS * STEP)
    count = tl.minimum(num_columns - begin, STEPS * STEP).to(tl.int32)
    offs = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    sums: tl.tuple = ()
    for _ in tl.static_range(NUM_ROWS * (NUM_ROWS + 1) // 2):
        sums = sums + (tl.zeros([LANES], tl.float32),)
    # Only the last step has a mask, since the compiler uses vector instructions for masked loads
    # only if num_columns is a multiple of VECTOR.
    whole = count // STEP
    for step in range(whole):
        sums = _add_products(sums, row_ptrs, begin, step * STEP + offs, None, NUM_ROWS, False)
    for step in range(whole, tl.cdiv(count, STEP)):
        offs_step = step * STEP + offs
        sums = _add_products(sums, row_ptrs, begin, offs_step, offs_step < count, NUM_ROWS, True)
    for entry in tl.static_range(NUM_ROWS * (NUM_ROWS + 1) // 2):
        tl.store(partials_ptr + entry * num_pieces + piece, tl.sum(sums[entry], axis=0))


@triton.jit(do_not_specialize=["num_pieces"])
def _sum_partials_kernel(
    partials_ptr: tl.tensor,
    gram_ptr: tl.tensor,
    num_pieces: tl.tensor,
    NUM_ROWS: tl.constexpr,
    BLOCK_PIECES: tl.constexpr,
) -> None:
    """Add up the partial sums of one pair of tasks i <= j; store the sum as G[i, j] and G[j, i]."""
    i = tl.program_id(0)
    j = tl.program_id(1)
    if i <= j:
        entry = i * NUM_ROWS - i * (i - 1) // 2 + j - i
        sums = tl.zeros([BLOCK_PIECES], tl.float64)
        for first in range(0, num_pieces, BLOCK_PIECES):
            offs = first + tl.arange(0, BLOCK_PIECES)
            sums += tl.load(partials_ptr + entry * num_pieces + offs, mask=offs < num_pieces, other=0.0).to(tl.float64)
        total = tl.sum(sums, axis=0).to(tl.float32)
        tl.store(gram_ptr + i * NUM_ROWS + j, total)
        tl.store(gram_ptr + j * NUM_ROWS + i, total)


@triton.jit
def _combine_block(
    row_ptrs: tl.tuple,
    weights_ptr: tl.tensor,
    out_ptr: tl.tensor,
    offs: tl.tensor,
    mask: tl.tensor,
    NUM_ROWS: tl.constexpr,
    MAX_ROWS: tl.constexpr,
) -> None:
    merged = tl.zeros(offs.shape, tl.float32)
    for t in tl.static_range(NUM_ROWS):
        if t % MAX_ROWS == 0 and t > 0:
            # The barrier keeps the compiler from loading more rows ahead than fit in registers.
            tl.debug_barrier()
        row = tl.load(row_ptrs[t] + offs, mask=mask)
        merged += tl.load(weights_ptr + t) * row.to(tl.float32)
    tl.store(out_ptr + offs, merged.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_columns"])
def _combine_kernel(
    row_ptrs: tl.tuple,
    weights_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_columns: tl.tensor,
    NUM_ROWS: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    """Store BLOCK columns of the weighted sum of the rows."""
    # Program 0 has the last block: that block may be incomplete and slow, so it starts first.
    begin = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64) * BLOCK
    if begin + BLOCK <= num_columns:
        _combine_block(row_ptrs, weights_ptr, out_ptr, begin + tl.arange(0, BLOCK), None, NUM_ROWS, MAX_ROWS)
    else:
        for first in range(begin, num_columns, LANES):
            offs = first + tl.arange(0, LANES)
            _combine_block(row_ptrs, weights_ptr, out_ptr, offs, offs < num_columns, NUM_ROWS, MAX_ROWS)


def _gramian_of_rows(rows: Sequence[Tensor]) -> Tensor:
    """Return the Gramian of up to MAX_ROWS rows of equal length, float32 [rows, rows]."""
    num_rows, num_columns, vector = len(rows), rows[0].numel(), 16 // rows[0].element_size()
    num_pieces = triton.cdiv(num_columns, STEPS * LANES * vector)
    partials = rows[0].new_empty(num_rows * (num_rows + 1) // 2, num_pieces, dtype=torch.float32)
    gram = rows[0].new_empty(num_rows, num_rows, dtype=torch.float32)
    _gramian_kernel[(num_pieces,)](
        row_ptrs=tuple(rows),
        partials_ptr=partials,
        num_columns=num_columns,
        num_pieces=num_pieces,
        NUM_ROWS=num_rows,
        LANES=LANES,
        VECTOR=vector,
        STEPS=STEPS,
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )
    _sum_partials_kernel[(num_rows, num_rows)](
        partials_ptr=partials,
        gram_ptr=gram,
        num_pieces=num_pieces,
        NUM_ROWS=num_rows,
        BLOCK_PIECES=BLOCK_PIECES,
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )
    return gram


def gramian(grads: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return G [T, T] float32 on the device of the gradients."""
    rows = [row for (row,) in grads]
    num_tasks = len(rows)
    if rows[0].numel() == 0:
        return rows[0].new_zeros(num_tasks, num_tasks, dtype=torch.float32)
    with torch.cuda.device_of(rows[0]):
        if num_tasks <= MAX_ROWS:
            return _gramian_of_rows(rows)
        gram = rows[0].new_empty(num_tasks, num_tasks, dtype=torch.float32)
        groups = [slice(first, min(first + GROUP, num_tasks)) for first in range(0, num_tasks, GROUP)]
        for a, b in combinations(groups, 2):
            pair = _gramian_of_rows(rows[a] + rows[b])
            gram[a, a], gram[a, b] = pair[:GROUP, :GROUP], pair[:GROUP, GROUP:]
            gram[b, a], gram[b, b] = pair[GROUP:, :GROUP], pair[GROUP:, GROUP:]
        return gram


def combine(grads: Sequence[Sequence[Tensor]], weights: Tensor, out: Sequence[Tensor]) -> None:
    """Write the weighted sum over tasks into `out`.

    out: one contiguous tensor, float32 or of the gradients' dtype.
    """
    rows, (target,) = [row for (row,) in grads], out
    if target.numel() == 0:
        return
    block = 2 * LANES * 16 // target.element_size()
    with torch.cuda.device_of(target):
        _combine_kernel[(triton.cdiv(target.numel(), block),)](
            row_ptrs=tuple(rows),
            weights_ptr=weights.float().contiguous(),
            out_ptr=target,
            num_columns=target.numel(),
            NUM_ROWS=len(rows),
            MAX_ROWS=MAX_ROWS,
            BLOCK=block,
            LANES=LANES,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
