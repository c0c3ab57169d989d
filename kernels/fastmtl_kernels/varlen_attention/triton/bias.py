"""Bias of the scores by relative position in Triton: its arguments and its gradient.

The gradient of bias[g, head, j - i + R - 1] is the sum of dS[i, j] over the sequences of group g.
The kernels of backward store the sums of their score tiles by distance, and bias_bwd_kernel adds
them in a fixed order: equal inputs give equal bits. Sums are float32. They take 512 bytes of a
group, for each head of a tile, and 4 R + 512 bytes at most for each head of a block.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmtl_kernels.varlen_attention.plan import TILE, AttentionPlan

_TILE = tl.constexpr(TILE)


class Bias(NamedTuple):
    """The bias of a call.

    table: [groups, heads, 2 R - 1], contiguous. group_rows: int32 [groups + 1], the first row of
    qkv of each group; None if there is one group.
    """

    table: Tensor
    group_rows: Tensor | None

    @property
    def reach(self) -> int:
        """R: distances are less than it."""
        return self.table.shape[2] // 2 + 1

    @property
    def num_groups(self) -> int:
        return 1 if self.group_rows is None else self.table.shape[0]


class BiasSums(NamedTuple):
    """Sums of dS by distance, float32, as the kernels of backward store them.

    of_tiles: [tiles, heads, groups, 128]; distances from 0 to 63, then those from -64 to -1.
    of_blocks: [blocks, heads, width]; distances from the block's first row to 64 rows before the
    sequence's first, and on. Zeros where no distance of the sequence is.
    """

    of_tiles: Tensor
    of_blocks: Tensor

    @classmethod
    def empty(cls, bias: Bias, plan: AttentionPlan, num_heads: int) -> BiasSums:
        device, width = bias.table.device, TILE * (triton.cdiv(bias.reach, TILE) + 1)
        sizes = plan.num_tiles, num_heads, bias.num_groups, 2 * TILE
        of_blocks = torch.zeros(plan.num_blocks, num_heads, width, dtype=torch.float32, device=device)
        return cls(torch.empty(sizes, dtype=torch.float32, device=device), of_blocks)


def bias_arguments(bias: Bias | None) -> dict[str, Any]:
    """Return the arguments of a kernel that reads the bias; all None without one."""
    if bias is None:
        return {"bias_ptr": None, "group_rows_ptr": None, "reach": None, "GROUPS": None, "BLOCK_G": None}
    return {
        "bias_ptr": bias.table,
        "group_rows_ptr": bias.group_rows,
        "reach": bias.reach,
        "GROUPS": bias.num_groups,
        "BLOCK_G": triton.next_power_of_2(bias.num_groups),
    }


@triton.jit(
    do_not_specialize=["num_tiles", "num_blocks", "sums_width", "reach"],
    do_not_specialize_on_alignment=["blocks_ptr", "group_rows_ptr"],
)
def bias_bwd_kernel(
    dbias_ptr: tl.tensor,
    tile_sums_ptr: tl.tensor,
    block_sums_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    group_rows_ptr: tl.tensor,
    num_tiles: tl.tensor,
    num_blocks: tl.tensor,
    num_heads: tl.tensor,
    sums_width: tl.tensor,
    reach: tl.tensor,
    GROUPS: tl.constexpr,
) -> None:
    """Store the gradient of 64 distances for one head of one group.

    tl.program_id(0) is the chunk of distances, tl.program_id(1) is head + num_heads * group.
    """
    chunk = tl.program_id(0) - tl.cdiv(reach - 1, _TILE)
    head = tl.program_id(1) % num_heads
    group = tl.program_id(1) // num_heads
    columns = tl.arange(0, _TILE)
    total = tl.zeros([_TILE], tl.float32)
    if (chunk == 0) | (chunk == -1):
        for first in range(0, num_tiles, _TILE):
            tiles = first + tl.arange(0, _TILE)
            index = ((tiles.to(tl.int64) * num_heads + head) * GROUPS + group) * 2 - chunk
            sums_ptr = tile_sums_ptr + index[:, None] * _TILE + columns[None, :]
            total += tl.sum(tl.load(sums_ptr, mask=(tiles < num_tiles)[:, None], other=0.0), 0)
    for first in range(0, num_blocks, _TILE):
        blocks = first + tl.arange(0, _TILE)
        present = blocks < num_blocks
        start = tl.load(blocks_ptr + 3 * blocks, mask=present, other=0)
        place = tl.load(blocks_ptr + 3 * blocks + 2, mask=present, other=0) - start
        if GROUPS > 1:
            present &= start >= tl.load(group_rows_ptr + group)
            if group + 1 < GROUPS:
                present &= start < tl.load(group_rows_ptr + group + 1)
        column = (chunk + 1) * _TILE + place
        present &= (column >= 0) & (column < sums_width)
        index = (blocks.to(tl.int64) * num_heads + head) * sums_width + column
        sums_ptr = block_sums_ptr + index[:, None] + columns[None, :]
        total += tl.sum(tl.load(sums_ptr, mask=present[:, None], other=0.0), 0)
    distance = chunk * _TILE + columns
    dbias_ptr += tl.program_id(1).to(tl.int64) * (2 * reach - 1) + distance + reach - 1
    tl.store(dbias_ptr, total.to(dbias_ptr.dtype.element_ty), mask=(distance < reach) & (distance > -reach))


def bias_gradient(bias: Bias, sums: BiasSums, plan: AttentionPlan) -> Tensor:
    """Return the gradient of the bias from the sums that the kernels of backward have stored."""
    num_heads, last = bias.table.shape[1], bias.reach - 1
    dbias = torch.empty_like(bias.table)
    with torch.cuda.device_of(dbias):
        bias_bwd_kernel[(triton.cdiv(last, TILE) + last // TILE + 1, num_heads * bias.num_groups)](
            dbias_ptr=dbias,
            tile_sums_ptr=sums.of_tiles,
            block_sums_ptr=sums.of_blocks,
            blocks_ptr=plan.blocks,
            group_rows_ptr=bias.group_rows,
            num_tiles=plan.num_tiles,
            num_blocks=plan.num_blocks,
            num_heads=num_heads,
            sums_width=sums.of_blocks.shape[2],
            reach=bias.reach,
            GROUPS=bias.num_groups,
            num_warps=4,
        )
    return dbias
