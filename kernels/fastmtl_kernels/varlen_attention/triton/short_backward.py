"""Backward of attention over packed sequences of at most 64 tokens; see short.py."""

from __future__ import annotations

import triton
import triton.language as tl

from fastmtl_kernels.varlen_attention.plan import TILE
from fastmtl_kernels.varlen_attention.triton.common import diagonals, group_of, keep, key_slots, load_rows, store_rows
from fastmtl_kernels.varlen_attention.triton.short import key_groups, probabilities

_TILE = tl.constexpr(TILE)


@triton.jit
def _store_bias_sums(
    sums_ptr: tl.tensor,
    ds: tl.tensor,
    starts: tl.tensor,
    group_rows_ptr: tl.tensor,
    GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
) -> None:
    """Store the sums of dS by distance, [GROUPS, 2, 64]: the two results of `diagonals`."""
    groups = group_of(starts, group_rows_ptr, GROUPS, BLOCK_G)
    sums_ptr += tl.arange(0, _TILE)
    for group in range(GROUPS):
        ahead, behind = diagonals(ds, groups == group)
        tl.store(sums_ptr + 2 * _TILE * group, ahead)
        tl.store(sums_ptr + 2 * _TILE * group + _TILE, behind)


@triton.jit
def _tile_grads(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    dout_ptr: tl.tensor,
    dq_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    first_slot: tl.tensor,
    head: tl.tensor,
    stride_qkv_row: tl.tensor,
    stride_dout_row: tl.tensor,
    num_heads: tl.tensor,
    scale: tl.tensor,
    scale_log2: tl.tensor,
    threshold: tl.tensor,
    keep_scale: tl.tensor,
    bias_ptr: tl.tensor,
    bias_sums_ptr: tl.tensor,
    group_rows_ptr: tl.tensor,
    reach: tl.tensor,
    WANT_DQ: tl.constexpr,
    WANT_DK: tl.constexpr,
    WANT_DV: tl.constexpr,
    WINDOW: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Store dQ, dK and dV, those that WANT_* asks for, of the tile that begins at first_slot."""
    slots_m = first_slot + tl.arange(0, _TILE)
    slots_n = first_slot + key_slots()
    rows_m = tl.load(rows_ptr + slots_m)
    rows_n = tl.load(rows_ptr + slots_n)
    starts_m = tl.load(starts_ptr + slots_m)
    starts_n = tl.load(starts_ptr + slots_n)
    q = load_rows(q_ptr, rows_m, stride_qkv_row, starts_m >= 0, HEAD_DIM, BLOCK_D)
    k = load_rows(k_ptr, rows_n, stride_qkv_row, starts_n >= 0, HEAD_DIM, BLOCK_D)
    v = load_rows(v_ptr, rows_n, stride_qkv_row, starts_n >= 0, HEAD_DIM, BLOCK_D)
    dout = load_rows(dout_ptr, rows_m, stride_dout_row, starts_m >= 0, HEAD_DIM, BLOCK_D)

    p, norm = probabilities(
        q, k, starts_m, starts_n, head, num_heads, scale_log2,
        bias_ptr, group_rows_ptr, reach, WINDOW, GROUPS, BLOCK_G, PRECISION,
    )  # fmt: skip
    p *= norm[:, None]
    dp = tl.dot(dout, v.T, input_precision=PRECISION)
    dropped = p
    if DROPOUT:
        groups = key_groups(rows_ptr, starts_ptr, first_slot)
        kept = keep(tl.load(seed_ptr), groups, rows_m, head, threshold)
        dropped = tl.where(kept, p * keep_scale, 0.0)
        dp = tl.where(kept, dp * keep_scale, 0.0)
    part = num_heads * HEAD_DIM
    if WANT_DV:
        dv = tl.dot(dropped.to(dout.dtype).T, dout, input_precision=PRECISION)
        store_rows(dq_ptr + 2 * part, dv, rows_n, 3 * part, rows_n >= 0, HEAD_DIM, BLOCK_D)
    exact_ds = p * (dp - tl.sum(p * dp, 1)[:, None])
    ds = exact_ds.to(q.dtype)
    if WANT_DQ:
        if bias_sums_ptr is not None:
            _store_bias_sums(bias_sums_ptr, exact_ds, starts_m, group_rows_ptr, GROUPS, BLOCK_G)
        dq = tl.dot(ds, k, input_precision=PRECISION) * scale
        store_rows(dq_ptr, dq, rows_m, 3 * part, rows_m >= 0, HEAD_DIM, BLOCK_D)
    if WANT_DK:
        dk = tl.dot(ds.T, q, input_precision=PRECISION) * scale
        store_rows(dq_ptr + part, dk, rows_n, 3 * part, rows_n >= 0, HEAD_DIM, BLOCK_D)


@triton.jit
def _store_delta(
    out_ptr: tl.tensor,
    dout_ptr: tl.tensor,
    delta_ptr: tl.tensor,
    block_ptr: tl.tensor,
    head: tl.tensor,
    stride_dout_row: tl.tensor,
    num_heads: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Store rowsum(O dO) of the rows of a block, float32."""
    stop = tl.load(block_ptr + 1)
    rows = tl.load(block_ptr + 2) + tl.arange(0, _TILE)
    mask = rows < stop
    out = load_rows(out_ptr + head * HEAD_DIM, rows, num_heads * HEAD_DIM, mask, HEAD_DIM, BLOCK_D)
    dout = load_rows(dout_ptr, rows, stride_dout_row, mask, HEAD_DIM, BLOCK_D)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    tl.store(delta_ptr + rows.to(tl.int64) * num_heads + head, delta, mask=mask)


@triton.jit(
    do_not_specialize=["num_tiles", "reach"],
    do_not_specialize_on_alignment=["rows_ptr", "starts_ptr", "blocks_ptr", "seed_ptr", "bias_ptr", "group_rows_ptr"],
)
def tile_bwd_kernel(
    qkv_ptr: tl.tensor,
    out_ptr: tl.tensor,
    dout_ptr: tl.tensor,
    dqkv_ptr: tl.tensor,
    delta_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    num_tiles: tl.tensor,
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
    WINDOW: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Store dQ, dK and dV of the tile tl.program_id(0) // num_heads; with SPLIT, one program each.

    Programs after those of the tiles store rowsum(O dO) of the blocks, which saves a launch.
    """
    head = tl.program_id(0) % num_heads
    tile = tl.program_id(0) // num_heads
    first_slot = tile * _TILE
    q_ptr = qkv_ptr + head.to(tl.int64) * stride_qkv_head
    k_ptr = q_ptr + stride_qkv_part
    v_ptr = k_ptr + stride_qkv_part
    dout_ptr += head.to(tl.int64) * stride_dout_head
    dq_ptr = dqkv_ptr + head * HEAD_DIM
    if bias_sums_ptr is not None:
        bias_sums_ptr += tl.program_id(0).to(tl.int64) * (2 * _TILE * GROUPS)
    if tile >= num_tiles:
        if tl.program_id(1) == 0:
            block_ptr = blocks_ptr + (tile - num_tiles) * 3
            _store_delta(
                out_ptr, dout_ptr, delta_ptr, block_ptr, head, stride_dout_row, num_heads, HEAD_DIM, BLOCK_D
            )  # fmt: skip
    elif SPLIT:
        if tl.program_id(1) == 0:
            _tile_grads(
                q_ptr, k_ptr, v_ptr, dout_ptr, dq_ptr, rows_ptr, starts_ptr, seed_ptr, first_slot, head,
                stride_qkv_row, stride_dout_row, num_heads, scale, scale_log2, threshold, keep_scale,
                bias_ptr, bias_sums_ptr, group_rows_ptr, reach,
                True, False, False, WINDOW, GROUPS, BLOCK_G, HEAD_DIM, BLOCK_D, DROPOUT, PRECISION,
            )  # fmt: skip
        elif tl.program_id(1) == 1:
            _tile_grads(
                q_ptr, k_ptr, v_ptr, dout_ptr, dq_ptr, rows_ptr, starts_ptr, seed_ptr, first_slot, head,
                stride_qkv_row, stride_dout_row, num_heads, scale, scale_log2, threshold, keep_scale,
                bias_ptr, bias_sums_ptr, group_rows_ptr, reach,
                False, True, False, WINDOW, GROUPS, BLOCK_G, HEAD_DIM, BLOCK_D, DROPOUT, PRECISION,
            )  # fmt: skip
        else:
            _tile_grads(
                q_ptr, k_ptr, v_ptr, dout_ptr, dq_ptr, rows_ptr, starts_ptr, seed_ptr, first_slot, head,
                stride_qkv_row, stride_dout_row, num_heads, scale, scale_log2, threshold, keep_scale,
                bias_ptr, bias_sums_ptr, group_rows_ptr, reach,
                False, False, True, WINDOW, GROUPS, BLOCK_G, HEAD_DIM, BLOCK_D, DROPOUT, PRECISION,
            )  # fmt: skip
    else:
        _tile_grads(
            q_ptr, k_ptr, v_ptr, dout_ptr, dq_ptr, rows_ptr, starts_ptr, seed_ptr, first_slot, head,
            stride_qkv_row, stride_dout_row, num_heads, scale, scale_log2, threshold, keep_scale,
            bias_ptr, bias_sums_ptr, group_rows_ptr, reach,
            True, True, True, WINDOW, GROUPS, BLOCK_G, HEAD_DIM, BLOCK_D, DROPOUT, PRECISION,
        )  # fmt: skip
