"""`reduce: local`, or one process: each rank has a Gramian of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl.surgery.jacobian.compact_rows import Rows


class Alone:
    """J is this rank's own: one process, or `reduce: local`, where each rank projects before DeepSpeed averages."""

    many = False

    def scatter(self, piece: Tensor) -> Tensor:
        return piece

    def gather_rows(self, tables: Sequence[list[Rows]], shapes: Sequence[torch.Size]) -> list[list[Rows]]:
        return list(tables)

    def total(self, value: Tensor) -> Tensor:
        return value
