"""The bounds of a packed batch in buffers of fixed addresses and sizes, so that a recording serves many batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from fastmtl.data.packed_batch import HostOffsets
from fastmtl.surgery.segments import Segments
from fastmtl_kernels.varlen_attention_plan import TILE, AttentionPlan

ROWS = 256
# Steps of tiles in a bucket: an empty tile costs the attention kernels what a full one costs.
_TILE_STEPS = 8
# Blocks are at most a 32nd of the rows (sequences of 65 tokens have two), and empty ones cost next to nothing.
_BLOCK_ROWS = 128


@dataclass(frozen=True)
class Bucket:
    """rows: N of the buffers. tiles, blocks: of the attention plan."""

    rows: int
    tiles: int
    blocks: int

    @classmethod
    def of(cls, num_rows: int, plan: AttentionPlan) -> Bucket:
        """The smallest for a batch; the plan is that of its `rows_of` rows."""
        rows = rows_of(num_rows)
        step = max(1, rows // TILE // _TILE_STEPS)
        return cls(rows, _up(len(plan.tile_rows), step), _up(len(plan.blocks), rows // _BLOCK_ROWS))

    def holds(self, other: Bucket) -> bool:
        return self.rows >= other.rows and self.tiles >= other.tiles and self.blocks >= other.blocks


def rows_of(num_rows: int) -> int:
    """Of the buffers for so many rows: one more at least, as grouped_mm's documentation has the last offset below N."""
    return _up(num_rows + 1, ROWS)


def _up(number: int, step: int) -> int:
    return -(-number // step) * step


class StaticBatch:
    """What attention and sums over tasks read of a batch. Everything is in one tensor, so that `fill` is one copy.

    segments: its host numbers are those of the buffers, (0, ..., 0, N): nothing on the host may depend on a batch.
    """

    def __init__(self, bucket: Bucket, num_tasks: int, device: torch.device) -> None:
        sizes = [num_tasks + 1, bucket.rows + 1, bucket.tiles * TILE, bucket.tiles * TILE, bucket.blocks * 3]
        # Each begins at 16 bytes, for which Triton compiles a kernel of its own.
        starts = list(accumulate((_up(size, 4) for size in sizes), initial=0))
        self._bounds = [(start, start + size) for start, size in zip(starts, sizes, strict=False)]
        self._numbers = torch.zeros(starts[-1], dtype=torch.int32, device=device)
        self.bucket = bucket
        offsets, self.cu_seqlens, tile_rows, tile_starts, blocks = self._parts(self._numbers)
        tiles = tile_rows.view(-1, TILE), tile_starts.view(-1, TILE)
        self.plan = AttentionPlan(*tiles, blocks.view(-1, 3), bucket.rows)
        self.segments = Segments(offsets, (0,) * num_tasks + (bucket.rows,))

    def fill(self, host: HostOffsets, plan: AttentionPlan) -> None:
        """plan: on the CPU, of a bucket that this one's holds and of its rows."""
        numbers = torch.zeros(len(self._numbers), dtype=torch.int32)
        offsets, cu_seqlens, tile_rows, tile_starts, blocks = self._parts(numbers)
        offsets.copy_(torch.tensor(host.token_offsets, dtype=torch.int32))
        _fill(cu_seqlens, host.cu_seqlens)
        for part, found in ((tile_rows, plan.tile_rows), (tile_starts, plan.tile_starts)):
            part.fill_(-1)
            part[: found.numel()] = found.view(-1)
        blocks[: plan.blocks.numel()] = plan.blocks.view(-1)
        self._numbers.copy_(numbers.pin_memory() if self._numbers.is_cuda else numbers, non_blocking=True)

    def _parts(self, numbers: Tensor) -> list[Tensor]:
        return [numbers[start:stop] for start, stop in self._bounds]


def _fill(cu_seqlens: Tensor, values: Sequence[int]) -> None:
    """Sequences past the last are empty."""
    cu_seqlens[: len(values)] = torch.tensor(values, dtype=torch.int32)
    cu_seqlens[len(values) :] = values[-1]
