"""`reduce: local`, or a single process: each rank has a Gramian of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl.surgery.jacobian.compact_rows import Rows


class Alone:
    """Ranks for a J of this rank alone: a single process, or `reduce: local`.

    No operation communicates. DeepSpeed averages the merged gradients of `reduce: local`.
    """

    many = False

    def scatter(self, piece: Tensor) -> Tensor:
        return piece

    def spans_of_share(
        self, spans: Sequence[tuple[int, slice]], num_tasks: int, columns: int
    ) -> list[tuple[int, slice]]:
        return list(spans)

    def gather_rows(self, tables: Sequence[list[Rows]], shapes: Sequence[torch.Size]) -> list[list[Rows]]:
        return list(tables)

    def total(self, value: Tensor) -> Tensor:
        return value
