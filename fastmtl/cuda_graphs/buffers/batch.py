"""The bounds of a packed batch in buffers of fixed addresses and sizes, so that a recording serves many batches."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from fastmtl.data.packed_batch import HostOffsets
from fastmtl.surgery.segments import Segments
from fastmtl_kernels.upload import upload_into
from fastmtl_kernels.varlen_attention.plan import TILE, AttentionPlan

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
        return cls(rows, _up(plan.num_tiles, step), _up(plan.num_blocks, rows // _BLOCK_ROWS))

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
        slots = bucket.tiles * TILE
        sizes = [num_tasks + 1, bucket.rows + 1, 2 * slots + 3 * bucket.blocks]
        # Each begins at 16 bytes, for which Triton compiles a kernel of its own, and so do the plan's parts.
        starts = list(accumulate((_up(size, 4) for size in sizes), initial=0))
        self._bounds = [slice(start, start + size) for start, size in zip(starts, sizes, strict=False)]
        self._slots = slots
        self._numbers = torch.zeros(starts[-1], dtype=torch.int32, device=device)
        self.bucket = bucket
        offsets, self.cu_seqlens, plan = (self._numbers[bounds] for bounds in self._bounds)
        self.plan = AttentionPlan(plan, bucket.tiles, bucket.rows)
        self.segments = Segments(offsets, (0,) * num_tasks + (bucket.rows,))

    def fill(self, host: HostOffsets, plan: AttentionPlan) -> None:
        """plan: on the CPU, of a bucket that this one's holds and of its rows."""
        numbers = np.zeros(len(self._numbers), dtype=np.int32)
        offsets, cu_seqlens, planned = (numbers[bounds] for bounds in self._bounds)
        offsets[:] = host.token_offsets
        cu_seqlens[: len(host.cu_seqlens)] = host.cu_seqlens
        cu_seqlens[len(host.cu_seqlens) :] = host.cu_seqlens[-1]  # sequences past the last are empty
        found, slots = plan.numbers.numpy(), TILE * plan.num_tiles
        planned[: 2 * self._slots] = -1
        planned[:slots] = found[:slots]
        planned[self._slots : self._slots + slots] = found[slots : 2 * slots]
        planned[2 * self._slots :][: 3 * plan.num_blocks] = found[2 * slots :]
        upload_into(self._numbers, torch.from_numpy(numbers))
