"""Functions of the Triton kernels of varlen_attention for short and long sequences.

In a score tile [64, 64], rows are queries in the order of the slots or rows, columns are keys in
the order of key_slots().
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastmtl_kernels.varlen_attention.plan import TILE

_TILE = tl.constexpr(TILE)
_LOG2_E = tl.constexpr(1.4426950408889634)


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
def group_of(rows: tl.tensor, group_rows_ptr: tl.tensor, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr) -> tl.tensor:
    """Return the group of the bias for sequences that begin at `rows` [64], int32 [64].

    group_rows: int32 [GROUPS + 1], the first row of each group; not read if there is one group.
    """
    groups = tl.zeros([_TILE], tl.int32)
    if GROUPS > 1:
        index = tl.arange(0, BLOCK_G)
        first = tl.load(group_rows_ptr + index, mask=index < GROUPS, other=2147483647)
        groups = tl.sum((rows[:, None] >= first[None, :]).to(tl.int32), 1) - 1
    return groups


@triton.jit
def load_bias(
    bias_ptr: tl.tensor,
    bias_rows: tl.tensor,
    places_m: tl.tensor,
    places_n: tl.tensor,
    seen: tl.tensor,
    reach: tl.tensor,
) -> tl.tensor:
    """Return the bias of a score tile times log2(e), float32 [64, 64]; zeros where `seen` is false.

    bias_rows: [64], the row of the bias [groups * heads, 2 * reach - 1] that each query takes.
    places_m, places_n: [64], of queries and keys. NaN for a distance that the bias lacks.
    """
    distances = places_n[None, :] - places_m[:, None]
    within = (distances < reach) & (distances > -reach)
    bias_ptr += bias_rows.to(tl.int64) * (2 * reach - 1) + reach - 1
    found = tl.load(bias_ptr[:, None] + distances, mask=seen & within, other=float("nan")).to(tl.float32)
    return tl.where(seen, found * _LOG2_E, 0.0)


@triton.jit
def diagonals(ds: tl.tensor, chosen: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Return the sums of a score tile's diagonals over the rows that `chosen` [64] names.

    The first result has those with key - query = 0 to 63, the second those with -64 to -1.
    """
    rows = tl.arange(0, _TILE)
    slots = rows[:, None] + rows[None, :]
    # The column of the slot (row + column) % 64: the inverse of key_slots.
    columns = (slots & 0x31) | ((slots & 12) >> 1) | ((slots & 2) << 2)
    turned = tl.where(chosen[:, None], tl.gather(ds, columns, 1), 0.0)
    ahead = slots < _TILE
    return tl.sum(tl.where(ahead, turned, 0.0), 0), tl.sum(tl.where(ahead, 0.0, turned), 0)
