"""Buffers for the offsets and the attention plan of a packed batch, which a recording reads.

Their addresses and sizes are fixed, so that one recording serves many batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from fastmtl.data.packed_batch import HostOffsets
from fastmtl.surgery.segments import Segments
from fastmtl_kernels.upload import upload_into
from fastmtl_kernels.varlen_attention.plan import TILE, AttentionPlan

# The number of rows of a bucket is a multiple of ROWS.
ROWS = 256
# The number of tiles of a bucket is rounded up to a multiple of about 1 / _TILE_STEPS of the tiles
# that its rows fill. A coarser step would waste time: an empty tile costs the attention kernels as
# much as a full one.
_TILE_STEPS = 8
# The number of blocks of a bucket is a multiple of rows / _BLOCK_ROWS. Few multiples are possible:
# there is at most one block per 32 rows (a sequence of 65 tokens has two). An empty block costs
# next to nothing.
_BLOCK_ROWS = 128


@dataclass(frozen=True)
class Bucket:
    """Buffer sizes of a recording; batches that need the same sizes share it.

    rows: N, the rows of the buffers. tiles, blocks: those of the attention plan.
    """

    rows: int
    tiles: int
    blocks: int

    @classmethod
    def of(cls, num_rows: int, plan: AttentionPlan) -> Bucket:
        """Return the smallest bucket that a batch fits into.

        num_rows: tokens of the batch. plan: its attention plan for `rows_of(num_rows)` rows.
        """
        rows = rows_of(num_rows)
        step = max(1, rows // TILE // _TILE_STEPS)
        return cls(rows, _up(plan.num_tiles, step), _up(plan.num_blocks, rows // _BLOCK_ROWS))

    def holds(self, other: Bucket) -> bool:
        """Return True if a batch of the other bucket fits into the buffers of this one."""
        return self.rows >= other.rows and self.tiles >= other.tiles and self.blocks >= other.blocks


def rows_of(num_rows: int) -> int:
    """Return N, the number of buffer rows for a batch of num_rows tokens.

    N is larger than num_rows, since the documentation of grouped_mm requires that the last offset
    is below N.
    """
    return _up(num_rows + 1, ROWS)


def _up(number: int, step: int) -> int:
    return -(-number // step) * step


class StaticBatch:
    """Offsets and attention plan of the current batch, on the device at fixed addresses.

    All numbers are views of one tensor, so that `fill` needs one copy to the device.
    Attribute segments: the rows of each task. Its `offsets` are the batch's, but its `host` is
    (0, ..., 0, N) for every batch: a recording keeps what the host read when it was made.
    """

    def __init__(self, bucket: Bucket, num_tasks: int, device: torch.device) -> None:
        slots = bucket.tiles * TILE
        sizes = [num_tasks + 1, bucket.rows + 1, 2 * slots + 3 * bucket.blocks]
        # Every view, and every part of the plan, begins at a multiple of 16 bytes: for an address
        # that is no multiple Triton compiles another kernel.
        starts = list(accumulate((_up(size, 4) for size in sizes), initial=0))
        self._bounds = [slice(start, start + size) for start, size in zip(starts, sizes, strict=False)]
        self._slots = slots
        self._numbers = torch.zeros(starts[-1], dtype=torch.int32, device=device)
        self.bucket = bucket
        offsets, self.cu_seqlens, plan = (self._numbers[bounds] for bounds in self._bounds)
        self.plan = AttentionPlan(plan, bucket.tiles, bucket.rows)
        self.segments = Segments(offsets, (0,) * num_tasks + (bucket.rows,))

    def fill(self, host: HostOffsets, plan: AttentionPlan) -> None:
        """Copy the offsets and the plan of a batch to the device.

        plan: on the CPU, made for the rows of `self.bucket`; its tiles and blocks fit in there.
        """
        numbers = np.zeros(len(self._numbers), dtype=np.int32)
        offsets, cu_seqlens, planned = (numbers[bounds] for bounds in self._bounds)
        offsets[:] = host.token_offsets
        cu_seqlens[: len(host.cu_seqlens)] = host.cu_seqlens
        cu_seqlens[len(host.cu_seqlens) :] = host.cu_seqlens[-1]  # the further sequences are empty
        found, slots = plan.numbers.numpy(), TILE * plan.num_tiles
        planned[: 2 * self._slots] = -1
        planned[:slots] = found[:slots]
        planned[self._slots : self._slots + slots] = found[slots : 2 * slots]
        planned[2 * self._slots :][: 3 * plan.num_blocks] = found[2 * slots :]
        upload_into(self._numbers, torch.from_numpy(numbers))
