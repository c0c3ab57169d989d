"""Which rows belong to which task."""

from __future__ import annotations

from dataclasses import dataclass

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
