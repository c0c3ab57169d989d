"""Sums of an embedding table's task gradients, in operations that can be recorded.

Shapes: T tasks, a table [V, d], buffers of K rows. A recording needs fixed addresses and sizes.
Rows with equal ids are therefore found by a sort on the device, and the results have K rows however
many ids are equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from fastmtl.surgery.jacobian.compact_rows import Rows

STEP = 1024


def capacity_of(num_rows: int) -> int:
    """Return K >= num_rows, the number of buffer rows for num_rows rows.

    K is a multiple of STEP, and for many rows of an eighth of the next power of two: batches then
    need few different K.
    """
    step = max(STEP, (1 << max(num_rows - 1, 1).bit_length()) // 8)
    return max(1, -(-num_rows // step)) * step


class StaticRows:
    """Buffers for the gradient rows of one table in one step, ordered by task.

    Attributes ids: int64 [K], the row of the table that each gradient row belongs to.
    rows: float32 [K, d], the gradient rows.
    """

    def __init__(self, capacity: int, width: int, device: torch.device) -> None:
        self.ids = torch.zeros(capacity, dtype=torch.int64, device=device)
        self.rows = torch.zeros(capacity, width, device=device)

    def fill(self, per_task: Sequence[Sequence[Rows]], capacity: int) -> list[int]:
        """Copy the ids and rows of all tasks into the buffers.

        per_task: for each task, the (ids, rows) pairs of one table in `Tables`.
        capacity: number of buffer rows that the recording reads, at most K. Those after the last
        task's rows become zeros.
        Return T + 1 bounds: task t has the rows bounds[t]:bounds[t + 1].
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
    """Sum the rows of each task that have equal ids.

    ids [K], rows [K, d]: buffers of StaticRows. bounds: its T + 1 bounds, int64 on the same device.
    num_rows: V.
    Return (sums, unique). sums[t, k], of float32 [T, K, d], is task t's sum for the id unique[k],
    of int64 [K]. Unused entries of `unique` are V.
    Equal inputs give equal bits. On a GPU `index_put_` sorts: one warp per column block adds the
    equal ids of a task one after another, where `index_add_` would add in the order of arrival.
    """
    capacity, num_tasks = len(ids), len(bounds) - 1
    at = torch.arange(capacity, device=ids.device)
    # Each unused row gets an id of its own, V or more. With one id for all of them, one warp would
    # add up hundreds of zero rows.
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
    """Write the merged rows [K, d] of the ids `unique` [K] into the table's gradient `out`.

    out: float32 [V + 1, d]; its other rows become zeros. The last row takes the unused entries of
    `unique` and is meaningless.
    """
    out.zero_().index_copy_(0, unique, merged)
