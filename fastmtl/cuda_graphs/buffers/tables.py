"""Task gradients of an embedding table in buffers of fixed sizes and addresses, so that a recording serves every step.

Shapes: T tasks, a table [V, d], K rows of the buffers. Which ids are equal is found on the device, by sorting: nothing
has a size that depends on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from fastmtl.surgery.jacobian.compact_rows import Rows

STEP = 1024


def capacity_of(num_rows: int) -> int:
    """K for so many rows: in steps of STEP, and of a quarter of a power of two where that is more."""
    step = max(STEP, (1 << max(num_rows - 1, 1).bit_length()) // 8)
    return max(1, -(-num_rows // step)) * step


class StaticRows:
    """The rows of a step, one task's after the other's.

    ids: int64 [K]. rows: float32 [K, d].
    """

    def __init__(self, capacity: int, width: int, device: torch.device) -> None:
        self.ids = torch.zeros(capacity, dtype=torch.int64, device=device)
        self.rows = torch.zeros(capacity, width, device=device)

    def fill(self, per_task: Sequence[Sequence[Rows]], capacity: int) -> list[int]:
        """What `Tables` keeps of a table -> the tasks' bounds among the rows, T + 1 numbers. capacity: how many rows of
        the buffers are used.
        """
        parts = [part for task in per_task for part in task]
        bounds = list(accumulate((sum(len(ids) for ids, _ in task) for task in per_task), initial=0))
        if bounds[-1]:
            ids, rows = zip(*parts, strict=True)
            torch.cat(ids, out=self.ids[: bounds[-1]])
            torch.cat(rows, out=self.rows[: bounds[-1]])
        self.rows[bounds[-1] : capacity].zero_()
        return bounds


def sums_by_id(ids: Tensor, rows: Tensor, bounds: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Sums over equal ids: float32 [T, K, d], and the id that each place [K] is of, V for none.

    ids [K], rows [K, d]: of StaticRows. bounds: int64 [T + 1] on their device. num_rows: V of the table.
    Equal inputs give equal bits: `index_put_` sorts on a GPU, so equal ids of a task are added up one after another, by
    one warp for some of the columns, where `index_add_` would add in the order of their arrival.
    """
    capacity, num_tasks = len(ids), len(bounds) - 1
    at = torch.arange(capacity, device=ids.device)
    # What is no row gets an id of its own, past the table: a place for each, so that none adds up hundreds of zeros.
    ids = torch.where(at < bounds[-1], ids, at + num_rows)
    task = torch.searchsorted(bounds[1:], at, right=True).clamp_(max=num_tasks - 1)
    found, order = ids.sort()
    steps = torch.zeros_like(ids)
    steps[1:] = found[1:] != found[:-1]
    sorted_place = steps.cumsum(0)
    place = torch.empty_like(ids).scatter_(0, order, sorted_place)
    unique = torch.full_like(ids, num_rows).scatter_(0, sorted_place, found).clamp_(max=num_rows)
    sums = rows.new_zeros(num_tasks * capacity, rows.shape[1])
    sums.index_put_((task * capacity + place,), rows, accumulate=True)
    return sums.view(num_tasks, capacity, -1), unique


def spread(merged: Tensor, unique: Tensor, out: Tensor) -> None:
    """merged [K, d] of the ids `unique` -> the table's gradient, float32 [V + 1, d], whose last row means nothing."""
    out.zero_().index_copy_(0, unique, merged)
