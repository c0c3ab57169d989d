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
def probabilities(
    q: tl.tensor,
    k: tl.tensor,
    starts_m: tl.tensor,
    starts_n: tl.tensor,
    head: tl.tensor,
    num_heads: tl.tensor,
    scale_log2: tl.tensor,
    bias_ptr: tl.tensor,
    group_rows_ptr: tl.tensor,
    reach: tl.tensor,
    WINDOW: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return exp2(scores - their maximum) [64, 64], and the inverse of its row sums [64]."""
    scores = tl.dot(q, k.T, input_precision=PRECISION) * scale_log2
    # Slots of no sequence attend to each other, so every row has a key; q, k and v are 0 there.
    seen = starts_m[:, None] == starts_n[None, :]
    slots_m, slots_n = tl.arange(0, _TILE), key_slots()
    if bias_ptr is not None:
        bias_rows = group_of(starts_m, group_rows_ptr, GROUPS, BLOCK_G) * num_heads + head
        scores += load_bias(bias_ptr, bias_rows, slots_m, slots_n, seen & (starts_m >= 0)[:, None], reach)
    if WINDOW is not None:
        seen &= tl.abs(slots_n[None, :] - slots_m[:, None]) <= WINDOW
    scores = tl.where(seen, scores, float("-inf"))
    p = tl.exp2(scores - tl.max(scores, 1)[:, None])
    return p, 1.0 / tl.sum(p, 1)


@triton.jit
def key_groups(rows_ptr: tl.tensor, starts_ptr: tl.tensor, first_slot: tl.tensor) -> tl.tensor:
    slots = first_slot + 4 * tl.arange(0, _TILE // 4)
    return (tl.load(rows_ptr + slots) - tl.load(starts_ptr + slots)) // 4


@triton.jit(
    do_not_specialize=["reach"],
    do_not_specialize_on_alignment=["rows_ptr", "starts_ptr", "seed_ptr", "bias_ptr", "group_rows_ptr"],
)
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

    p, norm = probabilities(
        q, k, starts_m, starts_n, head, num_heads, scale_log2,
        bias_ptr, group_rows_ptr, reach, WINDOW, GROUPS, BLOCK_G, PRECISION,
    )  # fmt: skip
    if DROPOUT:
        groups = key_groups(rows_ptr, starts_ptr, first_slot)
        p = tl.where(keep(tl.load(seed_ptr), groups, rows_m, head, threshold), p, 0.0)
        norm *= keep_scale
    out = tl.dot(p.to(v.dtype), v, input_precision=PRECISION) * norm[:, None]
    store_rows(out_ptr + head * HEAD_DIM, out, rows_m, num_heads * HEAD_DIM, rows_m >= 0, HEAD_DIM, BLOCK_D)
