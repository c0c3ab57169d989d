"""Protocol of the communication that the Gramian needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastmtl.surgery.jacobian.compact_rows import Rows


class Ranks(Protocol):
    """Communication with the ranks whose gradients add up to one J."""

    @property
    def many(self) -> bool:
        """True if J is a sum over several ranks."""
        ...

    def scatter(self, piece: Tensor) -> Tensor:
        """Sum the ranks' columns [T, n] of J, and return this rank's share of the sums."""
        ...

    def spans_of_share(
        self, spans: Sequence[tuple[int, slice]], num_tasks: int, columns: int
    ) -> list[tuple[int, slice]]:
        """Return the parts of the spans that are in this rank's share, and their places in it.

        spans: pairs of any number and a part of the columns of J [num_tasks, columns].
        """
        ...

    def gather_rows(self, tables: Sequence[list[Rows]], shapes: Sequence[torch.Size]) -> list[list[Rows]]:
        """Return the (ids, rows) pairs of each table's T tasks, summed over the ranks.

        tables: for each table, this rank's T pairs from `coalesce`. shapes: the tables' [V, d].
        """
        ...

    def total(self, value: Tensor) -> Tensor:
        """Sum a small tensor, which each rank computed from its share, in place and return it."""
        ...
