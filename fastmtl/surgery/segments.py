"""Which rows belong to which task."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Segments:
    """Rows of task t are offsets[t]:offsets[t + 1].

    offsets: int32 [T + 1] on the rows' device; host: the same numbers as Python integers, so that no op waits for the
    device.
    """

    offsets: Tensor
    host: tuple[int, ...]

    @property
    def num_tasks(self) -> int:
        return len(self.host) - 1

    def per_row(self, values: Tensor) -> Tensor:
        """values [T], one for each task -> [N], one for each row."""
        return values.repeat_interleave(self.offsets[1:] - self.offsets[:-1], output_size=self.host[-1])

    def split(self, rows: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
        """A view of each task's part of a dimension, by one call; what is past the last task belongs to none."""
        sizes = [stop - start for start, stop in pairwise(self.host)]
        rest = rows.shape[dim] - self.host[-1]
        return rows.split([*sizes, rest] if rest else sizes, dim)[: len(sizes)]
