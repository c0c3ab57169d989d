"""Protocol of the other ranks in the computation of the Gramian."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastmtl.surgery.jacobian.compact_rows import Rows


class Ranks(Protocol):
    """Operations of the Gramian that involve the other ranks."""

    @property
    def many(self) -> bool:
        """True if J is a sum over several ranks."""
        ...

    def scatter(self, piece: Tensor) -> Tensor:
        """Return this rank's share of the columns of J, from its own columns [T, n]."""
        ...

    def gather_rows(self, tables: Sequence[list[Rows]], shapes: Sequence[torch.Size]) -> list[list[Rows]]:
        """Return the rows of each table's T tasks, summed over the ranks of one J.

        tables: per table [V, d], the T tasks' rows from `coalesce`.
        """
        ...

    def total(self, value: Tensor) -> Tensor:
        """Sum a small tensor over the shares of J in place and return it."""
        ...
