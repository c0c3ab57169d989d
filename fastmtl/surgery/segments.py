"""The rows of each task."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Segments:
    """Bounds of tasks: rows offsets[t]:offsets[t + 1] belong to task t.

    offsets: int32 [T + 1] on the rows' device; host: the same numbers as Python integers, so that no op waits for the
    device.
    """

    offsets: Tensor
    host: tuple[int, ...]

    @property
    def num_tasks(self) -> int:
        return len(self.host) - 1

    def rows(self) -> list[slice]:
        """Return each task's rows."""
        return [slice(start, stop) for start, stop in pairwise(self.host)]

    def all_rows(self) -> slice:
        """Return the rows that belong to tasks; a masked tail may follow."""
        return slice(0, self.host[-1])

    def per_row(self, values: Tensor) -> Tensor:
        """Return values [T], one for each task, as [N], one for each row."""
        return values.repeat_interleave(self.offsets[1:] - self.offsets[:-1], output_size=self.host[-1])

    def split(self, rows: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
        """Return a view of each task's part of a dimension, by one call; what follows the last task belongs to none."""
        sizes = [stop - start for start, stop in pairwise(self.host)]
        rest = rows.shape[dim] - self.host[-1]
        return rows.split([*sizes, rest] if rest else sizes, dim)[: len(sizes)]
