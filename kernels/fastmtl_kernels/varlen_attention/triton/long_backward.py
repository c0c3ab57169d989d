"""Backward of attention over packed sequences of more than 64 tokens; see long.py."""

from __future__ import annotations

import triton
import triton.language as tl

from fastmtl_kernels.varlen_attention.plan import TILE
from fastmtl_kernels.varlen_attention.triton.common import diagonals, keep, key_slots, load_bias, load_rows, store_rows
from fastmtl_kernels.varlen_attention.triton.long import bias_rows_of, in_window, load_stats, seen_keys

_TILE = tl.constexpr(TILE)


@triton.jit
def _block_grads(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    dout: tl.tensor,
    peak: tl.tensor,
    log2_total: tl.tensor,
    delta: tl.tensor,
    mask_m: tl.tensor,
    mask_n: tl.tensor,
    groups: tl.tensor,
    rows_m: tl.tensor,
    rows_n: tl.tensor,
    head: tl.tensor,
    seed_ptr: tl.tensor,
    scale_log2: tl.tensor,
    threshold: tl.tensor,
    keep_scale: tl.tensor,
    bias_ptr: tl.tensor,
    bias_rows: tl.tensor,
    reach: tl.tensor,
    WINDOW: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return Z P and dS of 64 queries and 64 keys in qkv's dtype for tl.dot, and dS in float32."""
    scores = tl.dot(q, k.T, input_precision=PRECISION)
    if bias_ptr is not None:
        bias = load_bias(bias_ptr, bias_rows, rows_m, rows_n, mask_m[:, None] & mask_n[None, :], reach)
        below = tl.fma(scores, scale_log2, bias - peak[:, None])
    else:
        below = tl.fma(scores, scale_log2, -peak[:, None])
    p = tl.where(seen_keys(rows_m, rows_n, mask_n, WINDOW), tl.exp2(below - log2_total[:, None]), 0.0)
    dp = tl.dot(dout, v.T, input_precision=PRECISION)
    dropped = p
    if DROPOUT:
        kept = keep(tl.load(seed_ptr, volatile=True), groups, rows_m, head, threshold)
        dropped = tl.where(kept, p * keep_scale, 0.0)
        dp = tl.where(kept, dp * keep_scale, 0.0)
    dropped = dropped.to(q.dtype)
    ds = p * (dp - delta[:, None])
    return dropped, ds.to(q.dtype), ds


@triton.jit
def _key_grads(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    delta_ptr: tl.tensor,
    dout_ptr: tl.tensor,
    dq_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    first: tl.tensor,
    head: tl.tensor,
    stride_qkv_row: tl.tensor,
    stride_dout_row: tl.tensor,
    num_heads: tl.tensor,
    scale: tl.tensor,
    scale_log2: tl.tensor,
    threshold: tl.tensor,
    keep_scale: tl.tensor,
    bias_ptr: tl.tensor,
    bias_rows: tl.tensor,
    reach: tl.tensor,
    WANT_DK: tl.constexpr,
    WANT_DV: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Store dK and dV of the keys first:first + 64.

    The keys are in the order of key_slots: four neighbours share random words.
    """
    part = num_heads * HEAD_DIM
    rows_n = first + key_slots()
    mask_n = rows_n < stop
    groups = (first - start) // 4 + tl.arange(0, _TILE // 4)
    k = load_rows(k_ptr, rows_n, stride_qkv_row, mask_n, HEAD_DIM, BLOCK_D)
    v = load_rows(v_ptr, rows_n, stride_qkv_row, mask_n, HEAD_DIM, BLOCK_D)
    dk = tl.zeros([_TILE, BLOCK_D], tl.float32)
    dv = tl.zeros([_TILE, BLOCK_D], tl.float32)
    lower, upper = in_window(start, stop, first, WINDOW)
    for first_query in range(lower, upper, _TILE):
        rows_m = first_query + tl.arange(0, _TILE)
        mask_m = rows_m < stop
        q = load_rows(q_ptr, rows_m, stride_qkv_row, mask_m, HEAD_DIM, BLOCK_D)
        dout = load_rows(dout_ptr, rows_m, stride_dout_row, mask_m, HEAD_DIM, BLOCK_D)
        delta = tl.load(delta_ptr + rows_m.to(tl.int64) * num_heads, mask=mask_m, other=0.0)
        peak, log2_total = load_stats(stats_ptr, rows_m, num_heads, mask_m)
        dropped, ds, _ = _block_grads(
            q, k, v, dout, peak, log2_total, delta, mask_m, mask_n, groups, rows_m, rows_n, head, seed_ptr,
            scale_log2, threshold, keep_scale, bias_ptr, bias_rows, reach, WINDOW, DROPOUT, PRECISION,
        )  # fmt: skip
        if WANT_DV:
            dv = tl.dot(dropped.T, dout, dv, input_precision=PRECISION)
        if WANT_DK:
            dk = tl.dot(ds.T, q, dk, input_precision=PRECISION)
    if WANT_DK:
        store_rows(dq_ptr + part, dk * scale, rows_n, 3 * part, mask_n, HEAD_DIM, BLOCK_D)
    if WANT_DV:
        store_rows(dq_ptr + 2 * part, dv, rows_n, 3 * part, mask_n, HEAD_DIM, BLOCK_D)


@triton.jit(
    do_not_specialize=["reach", "sums_width"],
    do_not_specialize_on_alignment=["blocks_ptr", "seed_ptr", "bias_ptr", "group_rows_ptr"],
)
def long_bwd_kernel(
    qkv_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    delta_ptr: tl.tensor,
    dout_ptr: tl.tensor,
    dqkv_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    stride_qkv_row: tl.tensor,
    stride_qkv_part: tl.tensor,
    stride_qkv_head: tl.tensor,
    stride_dout_row: tl.tensor,
    stride_dout_head: tl.tensor,
    num_heads: tl.tensor,
    scale: tl.tensor,
    scale_log2: tl.tensor,
    threshold: tl.tensor,
    keep_scale: tl.tensor,
    bias_ptr: tl.tensor,
    bias_sums_ptr: tl.tensor,
    group_rows_ptr: tl.tensor,
    reach: tl.tensor,
    sums_width: tl.tensor,
    WINDOW: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Store dQ, dK or dV of a block.

    tl.program_id(1) is 0 for dQ and 1 for dK and dV; with SPLIT it is 1 for dK and 2 for dV.
    """
    head = tl.program_id(0) % num_heads
    block_ptr = blocks_ptr + tl.program_id(0) // num_heads * 3
    start = tl.load(block_ptr)
    stop = tl.load(block_ptr + 1)
    first = tl.load(block_ptr + 2)
    part = num_heads * HEAD_DIM
    q_ptr = qkv_ptr + head.to(tl.int64) * stride_qkv_head
    k_ptr = q_ptr + stride_qkv_part
    v_ptr = k_ptr + stride_qkv_part
    stats_ptr += head * 2
    delta_ptr += head
    dout_ptr += head.to(tl.int64) * stride_dout_head
    dq_ptr = dqkv_ptr + head * HEAD_DIM
    bias_rows = bias_rows_of(start, head, num_heads, group_rows_ptr, GROUPS, BLOCK_G)
    if tl.program_id(1) == 0:
        rows_m = first + tl.arange(0, _TILE)
        mask_m = rows_m < stop
        q = load_rows(q_ptr, rows_m, stride_qkv_row, mask_m, HEAD_DIM, BLOCK_D)
        dout = load_rows(dout_ptr, rows_m, stride_dout_row, mask_m, HEAD_DIM, BLOCK_D)
        delta = tl.load(delta_ptr + rows_m.to(tl.int64) * num_heads, mask=mask_m, other=0.0)
        peak, log2_total = load_stats(stats_ptr, rows_m, num_heads, mask_m)
        dq = tl.zeros([_TILE, BLOCK_D], tl.float32)
        lower, upper = in_window(start, stop, first, WINDOW)
        if bias_sums_ptr is not None:
            bias_sums_ptr += tl.program_id(0).to(tl.int64) * sums_width
            column, ahead = lower - start + tl.arange(0, _TILE), tl.zeros([_TILE], tl.float32)
        for first_key in range(lower, upper, _TILE):
            rows_n = first_key + key_slots()
            mask_n = rows_n < stop
            groups = (first_key - start) // 4 + tl.arange(0, _TILE // 4)
            k = load_rows(k_ptr, rows_n, stride_qkv_row, mask_n, HEAD_DIM, BLOCK_D)
            v = load_rows(v_ptr, rows_n, stride_qkv_row, mask_n, HEAD_DIM, BLOCK_D)
            _, ds, exact_ds = _block_grads(
                q, k, v, dout, peak, log2_total, delta, mask_m, mask_n, groups, rows_m, rows_n, head, seed_ptr,
                scale_log2, threshold, keep_scale, bias_ptr, bias_rows, reach, WINDOW, DROPOUT, PRECISION,
            )  # fmt: skip
            if bias_sums_ptr is not None:
                # Distances to these keys from -64 to -1 are those to the keys before from 0 to 63.
                next_ahead, behind = diagonals(exact_ds, mask_m)
                tl.store(bias_sums_ptr + column, ahead + behind, mask=column < sums_width)
                column, ahead = column + _TILE, next_ahead
            dq = tl.dot(ds, k, dq, input_precision=PRECISION)
        if bias_sums_ptr is not None:
            tl.store(bias_sums_ptr + column, ahead, mask=column < sums_width)
        store_rows(dq_ptr, dq * scale, rows_m, 3 * part, mask_m, HEAD_DIM, BLOCK_D)
    elif SPLIT:
        if tl.program_id(1) == 1:
            _key_grads(
                q_ptr, k_ptr, v_ptr, stats_ptr, delta_ptr, dout_ptr, dq_ptr, seed_ptr, start, stop, first, head,
                stride_qkv_row, stride_dout_row, num_heads, scale, scale_log2, threshold, keep_scale,
                bias_ptr, bias_rows, reach, True, False, WINDOW, HEAD_DIM, BLOCK_D, DROPOUT, PRECISION,
            )  # fmt: skip
        else:
            _key_grads(
                q_ptr, k_ptr, v_ptr, stats_ptr, delta_ptr, dout_ptr, dq_ptr, seed_ptr, start, stop, first, head,
                stride_qkv_row, stride_dout_row, num_heads, scale, scale_log2, threshold, keep_scale,
                bias_ptr, bias_rows, reach, False, True, WINDOW, HEAD_DIM, BLOCK_D, DROPOUT, PRECISION,
            )  # fmt: skip
    else:
        _key_grads(
            q_ptr, k_ptr, v_ptr, stats_ptr, delta_ptr, dout_ptr, dq_ptr, seed_ptr, start, stop, first, head,
            stride_qkv_row, stride_dout_row, num_heads, scale, scale_log2, threshold, keep_scale,
            bias_ptr, bias_rows, reach, True, True, WINDOW, HEAD_DIM, BLOCK_D, DROPOUT, PRECISION,
        )  # fmt: skip
