"""Bounds of a packed batch at fixed addresses and in fixed sizes: one recording, many batches."""

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
# Steps of tiles in a bucket: an empty tile costs the attention kernels as much as a full one.
_TILE_STEPS = 8
# At most a 32nd of the rows are blocks (sequences of 65 tokens have two); empty ones cost next to
# nothing.
_BLOCK_ROWS = 128


@dataclass(frozen=True)
class Bucket:
    """Sizes of a recording. rows: N of the buffers. tiles, blocks: of the attention plan."""

    rows: int
    tiles: int
    blocks: int

    @classmethod
    def of(cls, num_rows: int, plan: AttentionPlan) -> Bucket:
        """Return the smallest bucket of a batch. plan: for `rows_of(num_rows)` rows."""
        rows = rows_of(num_rows)
        step = max(1, rows // TILE // _TILE_STEPS)
        return cls(rows, _up(plan.num_tiles, step), _up(plan.num_blocks, rows // _BLOCK_ROWS))

    def holds(self, other: Bucket) -> bool:
        return self.rows >= other.rows and self.tiles >= other.tiles and self.blocks >= other.blocks


def rows_of(num_rows: int) -> int:
    """Return N of the buffers for a batch of num_rows rows.

    N is larger than num_rows: by the documentation of grouped_mm the last offset is below N.
    """
    return _up(num_rows + 1, ROWS)


def _up(number: int, step: int) -> int:
    return -(-number // step) * step


class StaticBatch:
    """Numbers of a batch for attention and per-task sums, in one tensor: `fill` is one copy.

    Attribute segments: its host numbers are those of the buffers, (0, ..., 0, N), because nothing
    on the host may depend on the batch.
    """

    def __init__(self, bucket: Bucket, num_tasks: int, device: torch.device) -> None:
        slots = bucket.tiles * TILE
        sizes = [num_tasks + 1, bucket.rows + 1, 2 * slots + 3 * bucket.blocks]
        # Each begins at a multiple of 16 bytes, and so do the parts of the plan: Triton compiles
        # another kernel for other addresses.
        starts = list(accumulate((_up(size, 4) for size in sizes), initial=0))
        self._bounds = [slice(start, start + size) for start, size in zip(starts, sizes, strict=False)]
        self._slots = slots
        self._numbers = torch.zeros(starts[-1], dtype=torch.int32, device=device)
        self.bucket = bucket
        offsets, self.cu_seqlens, plan = (self._numbers[bounds] for bounds in self._bounds)
        self.plan = AttentionPlan(plan, bucket.tiles, bucket.rows)
        self.segments = Segments(offsets, (0,) * num_tasks + (bucket.rows,))

    def fill(self, host: HostOffsets, plan: AttentionPlan) -> None:
        """plan: on the CPU, for this bucket's rows and of a bucket that this one holds."""
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
