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
from fastmtl_kernels.varlen_attention.triton.short import keep, key_slots, load_rows, store_rows

_TILE = tl.constexpr(TILE)


@triton.jit(do_not_specialize_on_alignment=["blocks_ptr", "seed_ptr"])
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
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Store O, and the stats that _load_stats loads, for the queries of a block.

    The block is tl.program_id(0) // num_heads.
    """
    head = tl.program_id(0) % num_heads
    block_ptr = blocks_ptr + tl.program_id(0) // num_heads * 3
    start = tl.load(block_ptr)
    stop = tl.load(block_ptr + 1)
    rows_m = tl.load(block_ptr + 2) + tl.arange(0, _TILE)
    mask_m = rows_m < stop
    q_ptr = qkv_ptr + head.to(tl.int64) * stride_qkv_head
    k_ptr = q_ptr + stride_qkv_part
    v_ptr = k_ptr + stride_qkv_part
    q = load_rows(q_ptr, rows_m, stride_qkv_row, mask_m, HEAD_DIM, BLOCK_D)

    out = tl.zeros([_TILE, BLOCK_D], tl.float32)
    peak = tl.full([_TILE], float("-inf"), tl.float32)
    total = tl.zeros([_TILE], tl.float32)
    for first_key in range(start, stop, _TILE):
        rows_n = first_key + key_slots()
        mask_n = rows_n < stop
        k = load_rows(k_ptr, rows_n, stride_qkv_row, mask_n, HEAD_DIM, BLOCK_D)
        v = load_rows(v_ptr, rows_n, stride_qkv_row, mask_n, HEAD_DIM, BLOCK_D)
        scores = tl.dot(q, k.T, input_precision=PRECISION)
        new_peak = tl.maximum(peak, tl.max(tl.where(mask_n[None, :], scores * scale_log2, float("-inf")), 1))
        p = tl.where(mask_n[None, :], tl.exp2(tl.fma(scores, scale_log2, -new_peak[:, None])), 0.0)
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


@triton.jit
def _load_stats(
    stats_ptr: tl.tensor, rows: tl.tensor, num_heads: tl.tensor, mask: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """Return each row's largest score and log2(sum(exp2(scores - largest))), float32 [64] both.

    Scores are already multiplied by scale_log2.
    """
    stats_ptr += rows.to(tl.int64) * num_heads * 2
    return tl.load(stats_ptr, mask=mask, other=0.0), tl.load(stats_ptr + 1, mask=mask, other=0.0)


@triton.jit
def _block_grads(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    dout: tl.tensor,
    peak: tl.tensor,
    log2_total: tl.tensor,
    delta: tl.tensor,
    mask_n: tl.tensor,
    groups: tl.tensor,
    rows_m: tl.tensor,
    head: tl.tensor,
    seed_ptr: tl.tensor,
    scale_log2: tl.tensor,
    threshold: tl.tensor,
    keep_scale: tl.tensor,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return Z P and dS of 64 queries and 64 keys, in qkv's dtype for tl.dot."""
    scores = tl.dot(q, k.T, input_precision=PRECISION)
    below = tl.fma(scores, scale_log2, -peak[:, None])
    p = tl.where(mask_n[None, :], tl.exp2(below - log2_total[:, None]), 0.0)
    dp = tl.dot(dout, v.T, input_precision=PRECISION)
    dropped = p
    if DROPOUT:
        kept = keep(tl.load(seed_ptr, volatile=True), groups, rows_m, head, threshold)
        dropped = tl.where(kept, p * keep_scale, 0.0)
        dp = tl.where(kept, dp * keep_scale, 0.0)
    return dropped.to(q.dtype), (p * (dp - delta[:, None])).to(q.dtype)


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
    WANT_DK: tl.constexpr,
    WANT_DV: tl.constexpr,
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
    for first_query in range(start, stop, _TILE):
        rows_m = first_query + tl.arange(0, _TILE)
        mask_m = rows_m < stop
        q = load_rows(q_ptr, rows_m, stride_qkv_row, mask_m, HEAD_DIM, BLOCK_D)
        dout = load_rows(dout_ptr, rows_m, stride_dout_row, mask_m, HEAD_DIM, BLOCK_D)
        delta = tl.load(delta_ptr + rows_m.to(tl.int64) * num_heads, mask=mask_m, other=0.0)
        peak, log2_total = _load_stats(stats_ptr, rows_m, num_heads, mask_m)
        dropped, ds = _block_grads(
            q, k, v, dout, peak, log2_total, delta, mask_n, groups, rows_m, head,
            seed_ptr, scale_log2, threshold, keep_scale, DROPOUT, PRECISION,
        )  # fmt: skip
        if WANT_DV:
            dv = tl.dot(dropped.T, dout, dv, input_precision=PRECISION)
        if WANT_DK:
            dk = tl.dot(ds.T, q, dk, input_precision=PRECISION)
    if WANT_DK:
        store_rows(dq_ptr + part, dk * scale, rows_n, 3 * part, mask_n, HEAD_DIM, BLOCK_D)
    if WANT_DV:
        store_rows(dq_ptr + 2 * part, dv, rows_n, 3 * part, mask_n, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize_on_alignment=["blocks_ptr", "seed_ptr"])
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
    if tl.program_id(1) == 0:
        rows_m = first + tl.arange(0, _TILE)
        mask_m = rows_m < stop
        q = load_rows(q_ptr, rows_m, stride_qkv_row, mask_m, HEAD_DIM, BLOCK_D)
        dout = load_rows(dout_ptr, rows_m, stride_dout_row, mask_m, HEAD_DIM, BLOCK_D)
        delta = tl.load(delta_ptr + rows_m.to(tl.int64) * num_heads, mask=mask_m, other=0.0)
        peak, log2_total = _load_stats(stats_ptr, rows_m, num_heads, mask_m)
        dq = tl.zeros([_TILE, BLOCK_D], tl.float32)
        for first_key in range(start, stop, _TILE):
            rows_n = first_key + key_slots()
            mask_n = rows_n < stop
            groups = (first_key - start) // 4 + tl.arange(0, _TILE // 4)
            k = load_rows(k_ptr, rows_n, stride_qkv_row, mask_n, HEAD_DIM, BLOCK_D)
            v = load_rows(v_ptr, rows_n, stride_qkv_row, mask_n, HEAD_DIM, BLOCK_D)
            _, ds = _block_grads(
                q, k, v, dout, peak, log2_total, delta, mask_n, groups, rows_m, head,
                seed_ptr, scale_log2, threshold, keep_scale, DROPOUT, PRECISION,
            )  # fmt: skip
            dq = tl.dot(ds, k, dq, input_precision=PRECISION)
        store_rows(dq_ptr, dq * scale, rows_m, 3 * part, mask_m, HEAD_DIM, BLOCK_D)
    elif SPLIT:
        if tl.program_id(1) == 1:
            _key_grads(
                q_ptr, k_ptr, v_ptr, stats_ptr, delta_ptr, dout_ptr, dq_ptr, seed_ptr, start, stop, first, head,
                stride_qkv_row, stride_dout_row, num_heads, scale, scale_log2, threshold, keep_scale,
                True, False, HEAD_DIM, BLOCK_D, DROPOUT, PRECISION,
            )  # fmt: skip
        else:
            _key_grads(
                q_ptr, k_ptr, v_ptr, stats_ptr, delta_ptr, dout_ptr, dq_ptr, seed_ptr, start, stop, first, head,
                stride_qkv_row, stride_dout_row, num_heads, scale, scale_log2, threshold, keep_scale,
                False, True, HEAD_DIM, BLOCK_D, DROPOUT, PRECISION,
            )  # fmt: skip
    else:
        _key_grads(
            q_ptr, k_ptr, v_ptr, stats_ptr, delta_ptr, dout_ptr, dq_ptr, seed_ptr, start, stop, first, head,
            stride_qkv_row, stride_dout_row, num_heads, scale, scale_log2, threshold, keep_scale,
            True, True, HEAD_DIM, BLOCK_D, DROPOUT, PRECISION,
        )  # fmt: skip
