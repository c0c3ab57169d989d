"""Rotary positions by Triton: the rotation of queries and keys before attention, and back after it.

    forward     [x1, x2] to [x1 cos - x2 sin, x2 cos + x1 sin], x a row of Q or K; a copy of qkv
    backward    [x1, x2] to [x1 cos + x2 sin, x2 cos - x1 sin], x a row of dQ or dK; in place

A program processes one head of the 64 rows of a tile or of a block of the plan. The table is
float32, and so is the arithmetic; results are rounded to qkv's dtype.

The copy includes V, so that attention keeps it for backward instead of qkv, not in addition to it.
Forward reads and writes 3 d numbers of each row, backward 2 d. docs/design-kernels.md compares this
with a rotation inside attention.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmtl_kernels.varlen_attention.plan import TILE, AttentionPlan

_TILE = tl.constexpr(TILE)


@triton.jit
def _turns(
    table_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    tile: tl.tensor,
    num_tiles: tl.tensor,
    num_places: tl.tensor,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Return the rows of a tile, [64] int64, and cosines, sines and their mask, [64, BLOCK_H].

    Tiles from num_tiles on are blocks. A place that the table [2, num_places, HALF] lacks gives
    NaN.
    """
    slots = tl.arange(0, _TILE)
    if tile < num_tiles:
        rows = tl.load(rows_ptr + tile * _TILE + slots)
        starts = tl.load(starts_ptr + tile * _TILE + slots)
        present = starts >= 0
    else:
        block_ptr = blocks_ptr + (tile - num_tiles) * 3
        rows = tl.load(block_ptr + 2) + slots
        starts = tl.load(block_ptr) + tl.zeros([_TILE], tl.int32)
        present = rows < tl.load(block_ptr + 1)
    columns = tl.arange(0, BLOCK_H)
    mask = present[:, None] & (columns < HALF)[None, :]
    places = rows - starts
    table_ptr += places[:, None] * HALF + columns[None, :]
    known = mask & (places < num_places)[:, None]
    cos = tl.load(table_ptr, mask=known, other=float("nan"))
    sin = tl.load(table_ptr + num_places * HALF, mask=known, other=float("nan"))
    return rows.to(tl.int64), cos, sin, mask


@triton.jit
def _rotate(
    from_ptr: tl.tensor, to_ptr: tl.tensor, cos: tl.tensor, sin: tl.tensor, mask: tl.tensor, HALF: tl.constexpr
) -> None:
    first = tl.load(from_ptr, mask=mask).to(tl.float32)
    second = tl.load(from_ptr + HALF, mask=mask).to(tl.float32)
    tl.store(to_ptr, (first * cos - second * sin).to(to_ptr.dtype.element_ty), mask=mask)
    tl.store(to_ptr + HALF, (second * cos + first * sin).to(to_ptr.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["num_tiles", "num_places"],
    do_not_specialize_on_alignment=["rows_ptr", "starts_ptr", "blocks_ptr"],
)
def rotary_fwd_kernel(
    qkv_ptr: tl.tensor,
    rotated_ptr: tl.tensor,
    table_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    num_tiles: tl.tensor,
    num_places: tl.tensor,
    stride_row: tl.tensor,
    stride_part: tl.tensor,
    stride_head: tl.tensor,
    num_heads: tl.tensor,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
) -> None:
    """Store one head of a tile's rotated Q and K, and of V; rotated is contiguous."""
    head = tl.program_id(0) % num_heads
    tile = tl.program_id(0) // num_heads
    rows, cos, sin, mask = _turns(
        table_ptr, rows_ptr, starts_ptr, blocks_ptr, tile, num_tiles, num_places, HALF, BLOCK_H
    )
    columns = tl.arange(0, BLOCK_H)
    part = 2 * num_heads * HALF
    qkv_ptr += rows[:, None] * stride_row + head.to(tl.int64) * stride_head + columns[None, :]
    rotated_ptr += rows[:, None] * (3 * part) + head * (2 * HALF) + columns[None, :]
    _rotate(qkv_ptr, rotated_ptr, cos, sin, mask, HALF)
    _rotate(qkv_ptr + stride_part, rotated_ptr + part, cos, sin, mask, HALF)
    qkv_ptr += 2 * stride_part
    rotated_ptr += 2 * part
    tl.store(rotated_ptr, tl.load(qkv_ptr, mask=mask), mask=mask)
    tl.store(rotated_ptr + HALF, tl.load(qkv_ptr + HALF, mask=mask), mask=mask)


@triton.jit(
    do_not_specialize=["num_tiles", "num_places"],
    do_not_specialize_on_alignment=["rows_ptr", "starts_ptr", "blocks_ptr"],
)
def rotary_bwd_kernel(
    dqkv_ptr: tl.tensor,
    table_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    num_tiles: tl.tensor,
    num_places: tl.tensor,
    num_heads: tl.tensor,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
) -> None:
    """Rotate one head of a tile's dQ and dK back, in place; dqkv is contiguous."""
    head = tl.program_id(0) % num_heads
    tile = tl.program_id(0) // num_heads
    rows, cos, sin, mask = _turns(
        table_ptr, rows_ptr, starts_ptr, blocks_ptr, tile, num_tiles, num_places, HALF, BLOCK_H
    )
    part = 2 * num_heads * HALF
    dqkv_ptr += rows[:, None] * (3 * part) + head * (2 * HALF) + tl.arange(0, BLOCK_H)[None, :]
    _rotate(dqkv_ptr, dqkv_ptr, cos, -sin, mask, HALF)
    _rotate(dqkv_ptr + part, dqkv_ptr + part, cos, -sin, mask, HALF)


def rotated(qkv: Tensor, table: Tensor, plan: AttentionPlan) -> Tensor:
    """Return a copy of qkv with Q and K rotated; rows of no sequence are not written."""
    result = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    if len(qkv):
        with torch.cuda.device_of(qkv):
            rotary_fwd_kernel[_grid(qkv, plan)](
                qkv_ptr=qkv,
                rotated_ptr=result,
                stride_row=qkv.stride(0),
                stride_part=qkv.stride(1),
                stride_head=qkv.stride(2),
                **_arguments(qkv, table, plan),
            )
    return result


def rotate_back(dqkv: Tensor, table: Tensor, plan: AttentionPlan) -> None:
    """Turn gradients of rotated Q and K into those of Q and K, in place. dqkv: contiguous."""
    if len(dqkv):
        with torch.cuda.device_of(dqkv):
            rotary_bwd_kernel[_grid(dqkv, plan)](dqkv_ptr=dqkv, **_arguments(dqkv, table, plan))


def _grid(qkv: Tensor, plan: AttentionPlan) -> tuple[int]:
    return ((plan.num_tiles + plan.num_blocks) * qkv.shape[2],)


def _arguments(qkv: Tensor, table: Tensor, plan: AttentionPlan) -> dict[str, Any]:
    _, num_places, half = table.shape
    return {
        "table_ptr": table,
        "rows_ptr": plan.tile_rows,
        "starts_ptr": plan.tile_starts,
        "blocks_ptr": plan.blocks,
        "num_tiles": plan.num_tiles,
        "num_places": num_places,
        "num_heads": qkv.shape[2],
        "HALF": half,
        "BLOCK_H": triton.next_power_of_2(half),
        "num_warps": 4,
    }
