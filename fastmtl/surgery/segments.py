"""The rows of each task in a batch, as ranges of the rows in the order of their tasks."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Segments:
    """Row ranges of T tasks: task t has the rows offsets[t]:offsets[t + 1], once rows are sorted.

    offsets: int32 [T + 1] on the device of the rows. host: the same numbers as Python integers,
    which can be read without waiting for the device. order: int64 [B], the rows of the batch sorted
    by task, those of no task last; None if the rows are in this order already. There may be k > 1
    rows of a layer per row of the batch; offsets and host count the layer's rows.
    """

    offsets: Tensor
    host: tuple[int, ...]
    order: Tensor | None = None
    # The order of a layer's rows, by their number.
    _orders: dict[int, Tensor] = field(init=False, default_factory=dict, repr=False)

    @property
    def num_tasks(self) -> int:
        return len(self.host) - 1

    def fixed(self) -> Segments:
        """Return segments that no later pass changes; see attach/several.py."""
        return self

    def sort(self, rows: Tensor) -> Tensor:
        """Return rows [B k, ...] in the order of their tasks: `rows` itself without `order`, else a
        copy. Row b of the batch has the k rows from b k.
        """
        if self.order is None:
            return rows
        if len(rows) not in self._orders:
            k = len(rows) // len(self.order)
            first = self.order.unsqueeze(1) * k
            self._orders[len(rows)] = (first + torch.arange(k, device=first.device)).flatten()
        return rows.index_select(0, self._orders[len(rows)])

    def rows(self) -> list[slice]:
        """Return the row range of each task."""
        return [slice(start, stop) for start, stop in pairwise(self.host)]

    def all_rows(self) -> slice:
        """Return the range of all tasks' rows; any rows after it belong to no task."""
        return slice(0, self.host[-1])

    def per_row(self, values: Tensor) -> Tensor:
        """Return values [T], one per task, as [N], one per row."""
        return values.repeat_interleave(self.offsets[1:] - self.offsets[:-1], output_size=self.host[-1])

    def split(self, rows: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
        """Return each task's part of `rows` along dimension `dim`, as views, by one operator call.

        Rows after the last task are left out.
        """
        sizes = [stop - start for start, stop in pairwise(self.host)]
        rest = rows.shape[dim] - self.host[-1]
        return rows.split([*sizes, rest] if rest else sizes, dim)[: len(sizes)]
