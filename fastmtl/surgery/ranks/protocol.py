"""The other ranks, as the Gramian needs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastmtl.surgery.jacobian.compact_rows import Rows


class Ranks(Protocol):
    """What surgery asks of the other ranks for its Gramian."""

    @property
    def many(self) -> bool:
        """Whether J is a sum over more than one."""
        ...

    def scatter(self, piece: Tensor) -> Tensor:
        """[T, n] of this rank -> this rank's share of the columns of what it stands for."""
        ...

    def gather_rows(self, tables: Sequence[list[Rows]], shapes: Sequence[torch.Size]) -> list[list[Rows]]:
        """Of each table [V, d] its T tasks' rows from `coalesce` -> the sums of those that belong to the same J."""
        ...

    def total(self, value: Tensor) -> Tensor:
        """Adds up a small tensor over the shares, in place, and returns it."""
        ...
