"""Triton kernels of attention over packed sequences of at most 64 tokens; formulas in launch.py.

A program processes one head of a tile of 64 slots (see fastmtl_kernels.varlen_attention.plan). It
has whole rows of P, so rowsum(P dP) stays in its registers. In a score tile [64, 64], rows are
queries in the order of the slots, columns are keys in the order of key_slots(). Loads, stores and
operands of tl.dot have qkv's dtype, other values are float32. Heads are padded with zeros from
HEAD_DIM to BLOCK_D, a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastmtl_kernels.varlen_attention.plan import TILE

_TILE = tl.constexpr(TILE)


@triton.jit
def key_slots() -> tl.tensor:
    """Return the slot of each column of a score tile, int32 [64].

    In a tensor core's result, a thread has columns 2t, 2t + 1, 2t + 8 and 2t + 9 of every 16. These
    get four neighbouring keys, so that the thread that draws four random words also uses them.
    """
    column = tl.arange(0, _TILE)
    return (column & 0x31) | ((column & 6) << 1) | ((column & 8) >> 2)


@triton.jit
def keep(seed: tl.tensor, groups: tl.tensor, rows: tl.tensor, head: tl.tensor, threshold: tl.tensor) -> tl.tensor:
    """Return the mask of dropout [64, 64]; groups [16]: keys' positions / 4, rows [64]: queries."""
    w0, w1, w2, w3 = tl.philox(seed, groups[None, :], rows[:, None], head, 0)
    k0 = w0.to(tl.int32, bitcast=True) >= threshold
    k1 = w1.to(tl.int32, bitcast=True) >= threshold
    k2 = w2.to(tl.int32, bitcast=True) >= threshold
    k3 = w3.to(tl.int32, bitcast=True) >= threshold
    # [query, 16s, t, word % 2, word // 2] to [query, 16s, word // 2, t, word % 2].
    words = tl.join(tl.join(k0, k1), tl.join(k2, k3)).reshape(_TILE, 4, 4, 2, 2)
    return words.permute(0, 1, 4, 2, 3).reshape(_TILE, _TILE)


@triton.jit
def load_rows(
    ptr: tl.tensor,
    rows: tl.tensor,
    stride_row: tl.tensor,
    mask: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    """Load one head of 64 rows, [64, BLOCK_D], zeros where `mask` [64] is false."""
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    offs = rows.to(tl.int64)[:, None] * stride_row + offs_d[None, :]
    return tl.load(ptr + offs, mask=mask[:, None] & mask_d[None, :], other=0.0)


@triton.jit
def store_rows(
    ptr: tl.tensor,
    value: tl.tensor,
    rows: tl.tensor,
    stride_row: tl.tensor,
    mask: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Store one head of 64 rows where `mask` [64] is true."""
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    offs = rows.to(tl.int64)[:, None] * stride_row + offs_d[None, :]
    tl.store(ptr + offs, value.to(ptr.dtype.element_ty), mask=mask[:, None] & mask_d[None, :])


@triton.jit
def _probabilities(
    q: tl.tensor,
    k: tl.tensor,
    starts_m: tl.tensor,
    starts_n: tl.tensor,
    scale_log2: tl.tensor,
    PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return exp2(scores - their maximum) [64, 64], and the inverse of its row sums [64]."""
    scores = tl.dot(q, k.T, input_precision=PRECISION) * scale_log2
    # Slots of no sequence attend to each other, so every row has a key; q, k and v are 0 there.
    scores = tl.where(starts_m[:, None] == starts_n[None, :], scores, float("-inf"))
    p = tl.exp2(scores - tl.max(scores, 1)[:, None])
    return p, 1.0 / tl.sum(p, 1)


@triton.jit
def _key_groups(rows_ptr: tl.tensor, starts_ptr: tl.tensor, first_slot: tl.tensor) -> tl.tensor:
    slots = first_slot + 4 * tl.arange(0, _TILE // 4)
    return (tl.load(rows_ptr + slots) - tl.load(starts_ptr + slots)) // 4


@triton.jit(do_not_specialize_on_alignment=["rows_ptr", "starts_ptr", "seed_ptr"])
def tile_fwd_kernel(
    qkv_ptr: tl.tensor,
    out_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    starts_ptr: tl.tensor,
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
    """Store O of the tile tl.program_id(0) // num_heads."""
    head = tl.program_id(0) % num_heads
    first_slot = tl.program_id(0) // num_heads * _TILE
    slots_m = first_slot + tl.arange(0, _TILE)
    slots_n = first_slot + key_slots()
    rows_m = tl.load(rows_ptr + slots_m)
    rows_n = tl.load(rows_ptr + slots_n)
    starts_m = tl.load(starts_ptr + slots_m)
    starts_n = tl.load(starts_ptr + slots_n)
    q_ptr = qkv_ptr + head.to(tl.int64) * stride_qkv_head
    k_ptr = q_ptr + stride_qkv_part
    v_ptr = k_ptr + stride_qkv_part
    q = load_rows(q_ptr, rows_m, stride_qkv_row, starts_m >= 0, HEAD_DIM, BLOCK_D)
    k = load_rows(k_ptr, rows_n, stride_qkv_row, starts_n >= 0, HEAD_DIM, BLOCK_D)
    v = load_rows(v_ptr, rows_n, stride_qkv_row, starts_n >= 0, HEAD_DIM, BLOCK_D)

    p, norm = _probabilities(q, k, starts_m, starts_n, scale_log2, PRECISION)
    if DROPOUT:
        groups = _key_groups(rows_ptr, starts_ptr, first_slot)
        p = tl.where(keep(tl.load(seed_ptr), groups, rows_m, head, threshold), p, 0.0)
        norm *= keep_scale
    out = tl.dot(p.to(v.dtype), v, input_precision=PRECISION) * norm[:, None]
    store_rows(out_ptr + head * HEAD_DIM, out, rows_m, num_heads * HEAD_DIM, rows_m >= 0, HEAD_DIM, BLOCK_D)


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
    WANT_DQ: tl.constexpr,
    WANT_DK: tl.constexpr,
    WANT_DV: tl.constexpr,
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

    p, norm = _probabilities(q, k, starts_m, starts_n, scale_log2, PRECISION)
    p *= norm[:, None]
    dp = tl.dot(dout, v.T, input_precision=PRECISION)
    dropped = p
    if DROPOUT:
        groups = _key_groups(rows_ptr, starts_ptr, first_slot)
        kept = keep(tl.load(seed_ptr), groups, rows_m, head, threshold)
        dropped = tl.where(kept, p * keep_scale, 0.0)
        dp = tl.where(kept, dp * keep_scale, 0.0)
    part = num_heads * HEAD_DIM
    if WANT_DV:
        dv = tl.dot(dropped.to(dout.dtype).T, dout, input_precision=PRECISION)
        store_rows(dq_ptr + 2 * part, dv, rows_n, 3 * part, rows_n >= 0, HEAD_DIM, BLOCK_D)
    ds = (p * (dp - tl.sum(p * dp, 1)[:, None])).to(q.dtype)
    if WANT_DQ:
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
    do_not_specialize=["num_tiles"],
    do_not_specialize_on_alignment=["rows_ptr", "starts_ptr", "blocks_ptr", "seed_ptr"],
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
                True, False, False, HEAD_DIM, BLOCK_D, DROPOUT, PRECISION,
            )  # fmt: skip
        elif tl.program_id(1) == 1:
            _tile_grads(
                q_ptr, k_ptr, v_ptr, dout_ptr, dq_ptr, rows_ptr, starts_ptr, seed_ptr, first_slot, head,
                stride_qkv_row, stride_dout_row, num_heads, scale, scale_log2, threshold, keep_scale,
                False, True, False, HEAD_DIM, BLOCK_D, DROPOUT, PRECISION,
            )  # fmt: skip
        else:
            _tile_grads(
                q_ptr, k_ptr, v_ptr, dout_ptr, dq_ptr, rows_ptr, starts_ptr, seed_ptr, first_slot, head,
                stride_qkv_row, stride_dout_row, num_heads, scale, scale_log2, threshold, keep_scale,
                False, False, True, HEAD_DIM, BLOCK_D, DROPOUT, PRECISION,
            )  # fmt: skip
    else:
        _tile_grads(
            q_ptr, k_ptr, v_ptr, dout_ptr, dq_ptr, rows_ptr, starts_ptr, seed_ptr, first_slot, head,
            stride_qkv_row, stride_dout_row, num_heads, scale, scale_log2, threshold, keep_scale,
            True, True, True, HEAD_DIM, BLOCK_D, DROPOUT, PRECISION,
        )  # fmt: skip
