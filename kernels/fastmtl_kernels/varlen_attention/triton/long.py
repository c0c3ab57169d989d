"""Triton kernels of attention over packed sequences of more than 64 tokens.

launch.py has the formulas.

A program processes one head of a block of 64 rows and loops over the blocks of its sequence.
Forward computes the running maximum and sum of FlashAttention-2 and stores both for every row, so
that backward computes P directly. Backward reads rowsum(P dP) = rowsum(O dO), which the launch of
tile_bwd_kernel stores. Score tiles, dtypes and padding are those of short.py.

Maximum and log2(sum) stay separate, and forward and backward subtract the maximum by the same fused
instruction: at a score of 2,000 float32 is exact to 1e-4 only, and an error of that size in P would
reach dV.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastmtl_kernels.varlen_attention.plan import TILE
from fastmtl_kernels.varlen_attention.triton.common import (
    group_of,
    keep,
    key_slots,
    load_bias,
    load_rows,
    store_rows,
)

_TILE = tl.constexpr(TILE)


@triton.jit
def seen_keys(rows_m: tl.tensor, rows_n: tl.tensor, mask_n: tl.tensor, WINDOW: tl.constexpr) -> tl.tensor:
    """Return the mask of the keys that queries see, [1, 64], with a window [64, 64]."""
    if WINDOW is not None:
        return mask_n[None, :] & (tl.abs(rows_n[None, :] - rows_m[:, None]) <= WINDOW)
    else:
        return mask_n[None, :]


@triton.jit
def bias_rows_of(
    start: tl.tensor,
    head: tl.tensor,
    num_heads: tl.tensor,
    group_rows_ptr: tl.tensor,
    GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
) -> tl.tensor:
    """Return the row of the bias of the sequence from row `start`, [64]; `head` without one."""
    if GROUPS is not None:
        return group_of(start + tl.zeros([_TILE], tl.int32), group_rows_ptr, GROUPS, BLOCK_G) * num_heads + head
    else:
        return head


@triton.jit
def in_window(start: tl.tensor, stop: tl.tensor, first: tl.tensor, WINDOW: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Return bounds of the rows that first:first + 64 see, from the first row of a block on."""
    if WINDOW is not None:
        lower = start + tl.maximum(first - WINDOW - start, 0) // _TILE * _TILE
        return lower, tl.minimum(first + _TILE + WINDOW, stop)
    else:
        return start, stop


@triton.jit
def load_stats(
    stats_ptr: tl.tensor, rows: tl.tensor, num_heads: tl.tensor, mask: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """Return each row's largest score and log2(sum(exp2(scores - largest))), float32 [64] both.

    Scores are already multiplied by scale_log2.
    """
    stats_ptr += rows.to(tl.int64) * num_heads * 2
    return tl.load(stats_ptr, mask=mask, other=0.0), tl.load(stats_ptr + 1, mask=mask, other=0.0)


@triton.jit(
    do_not_specialize=["reach"],
    do_not_specialize_on_alignment=["blocks_ptr", "seed_ptr", "bias_ptr", "group_rows_ptr"],
)
def long_fwd_kernel(
    qkv_ptr: tl.tensor,
    out_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    stride_qkv_row: tl.tensor,
    stride_qkv_part: tl.tensor,
    stride_qkv_head: tl.tensor,
    num_heads: tl.tensor,
    scale_log2: tl.tensor,
    threshold: tl.tensor,
    keep_scale: tl.tensor,
    bias_ptr: tl.tensor,
    group_rows_ptr: tl.tensor,
    reach: tl.tensor,
    WINDOW: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Store O, and the stats that load_stats loads, for the queries of a block.

    The block is tl.program_id(0) // num_heads.
    """
    head = tl.program_id(0) % num_heads
    block_ptr = blocks_ptr + tl.program_id(0) // num_heads * 3
    start = tl.load(block_ptr)
    stop = tl.load(block_ptr + 1)
    first = tl.load(block_ptr + 2)
    rows_m = first + tl.arange(0, _TILE)
    mask_m = rows_m < stop
    q_ptr = qkv_ptr + head.to(tl.int64) * stride_qkv_head
    k_ptr = q_ptr + stride_qkv_part
    v_ptr = k_ptr + stride_qkv_part
    q = load_rows(q_ptr, rows_m, stride_qkv_row, mask_m, HEAD_DIM, BLOCK_D)

    out = tl.zeros([_TILE, BLOCK_D], tl.float32)
    # A query may see no key of the first block of a window: a finite maximum then gives no NaN.
    peak = tl.full([_TILE], float("-inf") if WINDOW is None else -3e38, tl.float32)
    total = tl.zeros([_TILE], tl.float32)
    bias_rows = bias_rows_of(start, head, num_heads, group_rows_ptr, GROUPS, BLOCK_G)
    lower, upper = in_window(start, stop, first, WINDOW)
    for first_key in range(lower, upper, _TILE):
        rows_n = first_key + key_slots()
        mask_n = rows_n < stop
        k = load_rows(k_ptr, rows_n, stride_qkv_row, mask_n, HEAD_DIM, BLOCK_D)
        v = load_rows(v_ptr, rows_n, stride_qkv_row, mask_n, HEAD_DIM, BLOCK_D)
        scores = tl.dot(q, k.T, input_precision=PRECISION)
        seen = seen_keys(rows_m, rows_n, mask_n, WINDOW)
        if bias_ptr is not None:
            bias = load_bias(bias_ptr, bias_rows, rows_m, rows_n, mask_m[:, None] & mask_n[None, :], reach)
            scaled = tl.fma(scores, scale_log2, bias)
            new_peak = tl.maximum(peak, tl.max(tl.where(seen, scaled, float("-inf")), 1))
            below = tl.fma(scores, scale_log2, bias - new_peak[:, None])
        else:
            new_peak = tl.maximum(peak, tl.max(tl.where(seen, scores * scale_log2, float("-inf")), 1))
            below = tl.fma(scores, scale_log2, -new_peak[:, None])
        p = tl.where(seen, tl.exp2(below), 0.0)
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(p, 1)
        peak = new_peak
        if DROPOUT:
            groups = (first_key - start) // 4 + tl.arange(0, _TILE // 4)
            p = tl.where(keep(tl.load(seed_ptr, volatile=True), groups, rows_m, head, threshold), p, 0.0)
        out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)
    out *= (keep_scale / total)[:, None]
    store_rows(out_ptr + head * HEAD_DIM, out, rows_m, num_heads * HEAD_DIM, mask_m, HEAD_DIM, BLOCK_D)
    stats_ptr += (rows_m.to(tl.int64) * num_heads + head) * 2
    tl.store(stats_ptr, peak, mask=mask_m)
    tl.store(stats_ptr + 1, tl.log2(total), mask=mask_m)
