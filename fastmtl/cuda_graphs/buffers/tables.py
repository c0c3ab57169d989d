"""Task gradients of an embedding table at fixed addresses and in fixed sizes, to be recorded.

Shapes: T tasks, a table [V, d], K rows of the buffers. The device finds equal ids by a sort, so no
size depends on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from fastmtl.surgery.jacobian.compact_rows import Rows

STEP = 1024


def capacity_of(num_rows: int) -> int:
    """Return K for num_rows rows: a multiple of STEP, or of a quarter of a power of two."""
    step = max(STEP, (1 << max(num_rows - 1, 1).bit_length()) // 8)
    return max(1, -(-num_rows // step)) * step


class StaticRows:
    """Rows of a step, ordered by task.

    Attributes ids: int64 [K]. rows: float32 [K, d].
    """

    def __init__(self, capacity: int, width: int, device: torch.device) -> None:
        self.ids = torch.zeros(capacity, dtype=torch.int64, device=device)
        self.rows = torch.zeros(capacity, width, device=device)

    def fill(self, per_task: Sequence[Sequence[Rows]], capacity: int) -> list[int]:
        """Copy the rows of a table in `Tables` into the buffers; return the tasks' T + 1 bounds.

        capacity: number of rows of the buffers in use; those after the last bound become zeros.
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
    """Sum rows with equal ids: float32 [T, K, d], and the id of each place [K], V for no id.

    ids [K], rows [K, d]: of StaticRows. bounds: int64 [T + 1] on their device. num_rows: V.
    Equal inputs give equal bits. On a GPU `index_put_` sorts: one warp per column block adds the
    equal ids of a task one after another, where `index_add_` would add in the order of arrival.
    """
    capacity, num_tasks = len(ids), len(bounds) - 1
    at = torch.arange(capacity, device=ids.device)
    # Unused rows get ids past the table, one each, so that no place adds up hundreds of zeros.
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
    """Write merged [K, d] of the ids `unique` into the table's gradient `out`, float32 [V + 1, d].

    The last row of `out` is meaningless.
    """
    out.zero_().index_copy_(0, unique, merged)
