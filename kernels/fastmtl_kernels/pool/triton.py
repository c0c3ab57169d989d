"""Pooling over packed sequences by Triton; fastmtl_kernels.pool.api has the formulas.

x, dx [num_rows, D], out, dout [num_sequences, D] contiguous, float32, float16 or bfloat16;
cu_seqlens int32 [num_sequences + 1]; winners int32 [num_sequences, D], the row of each maximum.
Sums float32. A program computes BLOCK_D columns of one sequence. In backward one more program per
BLOCK_D columns writes zeros to the rows of dx past the last sequence.

Source: see fastmtl_kernels.pool.api.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmtl_kernels.row_blocks import load_rows

BLOCK_M = 16
MAX_BLOCK_D = 128
_NO_ROW = tl.constexpr(2**31 - 1)


@triton.jit
def _first_largest(a: tl.tensor, a_row: tl.tensor, b: tl.tensor, b_row: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Return the larger of the values a and b, and its row. Combines two results of a reduction.

    NaN counts as larger than all numbers; of equal values, that of the lower row is returned.
    """
    a_nan = a != a
    b_nan = b != b
    equal = (a == b) | (a_nan & b_nan)
    a_wins = (equal & (a_row < b_row)) | (~equal & (a_nan | (~b_nan & (a > b))))
    return tl.where(a_wins, a, b), tl.where(a_wins, a_row, b_row)


@triton.jit(do_not_specialize_on_alignment=["cu_seqlens_ptr"])
def _pool_fwd_kernel(
    x_ptr: tl.tensor,
    cu_seqlens_ptr: tl.tensor,
    out_ptr: tl.tensor,
    winners_ptr: tl.tensor,
    D: tl.constexpr,
    MODE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    sequence = tl.program_id(0)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    start = tl.load(cu_seqlens_ptr + sequence)
    stop = tl.load(cu_seqlens_ptr + sequence + 1)
    out_offs = sequence.to(tl.int64) * D + offs_d
    if MODE == "cls":
        out = load_rows(x_ptr, start.to(tl.int64) * D + offs_d, offs_d < tl.where(start < stop, D, 0))
    else:
        sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        best = tl.full([BLOCK_M, BLOCK_D], float("-inf"), tl.float32)
        best_row = tl.full([BLOCK_M, BLOCK_D], _NO_ROW, tl.int32)
        for row in range(start, stop, BLOCK_M):
            rows = row + tl.arange(0, BLOCK_M)
            mask = (rows < stop)[:, None] & mask_d[None, :]
            x = load_rows(x_ptr, rows.to(tl.int64)[:, None] * D + offs_d[None, :], mask)
            if MODE == "mean":
                sums += x
            else:
                x = tl.where(mask, x, float("-inf"))
                x_row = tl.where(mask, rows[:, None], _NO_ROW)
                best, best_row = _first_largest(best, best_row, x, x_row)
        if MODE == "mean":
            out = tl.sum(sums, 0) / tl.maximum(stop - start, 1)
        else:
            largest, winner = tl.reduce((best, best_row), 0, _first_largest)
            out = tl.where(start < stop, largest, 0.0)
            tl.store(winners_ptr + out_offs, winner, mask=mask_d)
    tl.store(out_ptr + out_offs, out.to(out_ptr.dtype.element_ty), mask=mask_d)


@triton.jit(do_not_specialize=["num_rows", "num_sequences"], do_not_specialize_on_alignment=["cu_seqlens_ptr"])
def _pool_bwd_kernel(
    dout_ptr: tl.tensor,
    cu_seqlens_ptr: tl.tensor,
    winners_ptr: tl.tensor,
    dx_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_sequences: tl.tensor,
    D: tl.constexpr,
    MODE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    sequence = tl.program_id(0)
    in_sequence = sequence < num_sequences
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    start = tl.load(cu_seqlens_ptr + sequence)
    next_start = tl.load(cu_seqlens_ptr + tl.minimum(sequence + 1, num_sequences))
    stop = tl.where(in_sequence, next_start, num_rows)
    dout_offs = sequence.to(tl.int64) * D + offs_d
    mask_out = offs_d < tl.where(in_sequence, D, 0)
    dout = load_rows(dout_ptr, dout_offs, mask_out)
    if MODE == "mean":
        dout = dout / tl.maximum(stop - start, 1)
    if MODE == "max":
        winner = tl.load(winners_ptr + dout_offs, mask=mask_out, other=-1)
    for row in range(start, stop, BLOCK_M):
        rows = row + tl.arange(0, BLOCK_M)
        mask = (rows < stop)[:, None] & mask_d[None, :]
        if MODE == "mean":
            dx = tl.broadcast_to(dout[None, :], [BLOCK_M, BLOCK_D])
        elif MODE == "cls":
            dx = tl.where((rows == start)[:, None], dout[None, :], 0.0)
        else:
            dx = tl.where(rows[:, None] == winner[None, :], dout[None, :], 0.0)
        offs = rows.to(tl.int64)[:, None] * D + offs_d[None, :]
        tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def _block_d(num_columns: int) -> int:
    return min(max(16, triton.next_power_of_2(num_columns)), MAX_BLOCK_D)


def forward(x: Tensor, cu_seqlens: Tensor, mode: str) -> tuple[Tensor, Tensor | None]:
    """Return out [B, d] of x's dtype, and the row of x that each maximum comes from.

    The rows are int32 [B, d]; None unless mode is "max".
    """
    num_sequences, num_columns = len(cu_seqlens) - 1, x.shape[1]
    out = torch.empty(num_sequences, num_columns, dtype=x.dtype, device=x.device)
    winners = torch.empty(out.shape, dtype=torch.int32, device=x.device) if mode == "max" else None
    block_d = _block_d(num_columns)
    if num_sequences:
        with torch.cuda.device_of(x):
            _pool_fwd_kernel[(num_sequences, triton.cdiv(num_columns, block_d))](
                x_ptr=x.contiguous(),
                cu_seqlens_ptr=cu_seqlens.contiguous(),
                out_ptr=out,
                winners_ptr=winners,
                D=num_columns,
                MODE=mode,
                BLOCK_M=BLOCK_M,
                BLOCK_D=block_d,
                num_warps=4,
                enable_fp_fusion=True,
            )
    return out, winners


def backward(dout: Tensor, cu_seqlens: Tensor, winners: Tensor | None, mode: str, num_rows: int) -> Tensor:
    """Return dx [num_rows, d] of dout's dtype. winners: the rows that `forward` returned."""
    num_sequences, num_columns = dout.shape
    dx = torch.empty(num_rows, num_columns, dtype=dout.dtype, device=dout.device)
    block_d = _block_d(num_columns)
    with torch.cuda.device_of(dout):
        _pool_bwd_kernel[(num_sequences + 1, triton.cdiv(num_columns, block_d))](
            dout_ptr=dout.contiguous(),
            cu_seqlens_ptr=cu_seqlens.contiguous(),
            winners_ptr=winners,
            dx_ptr=dx,
            num_rows=num_rows,
            num_sequences=num_sequences,
            D=num_columns,
            MODE=mode,
            BLOCK_M=BLOCK_M,
            BLOCK_D=block_d,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return dx
