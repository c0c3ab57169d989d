"""Parameters of linear maps that have their own weight for each task."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import nn

from fastmtl.model.owners import Owner


class PerTaskLinear(Owner):
    """Parameters of y = x W_t^T + b_t for each task t; kernels compute y.

    Attributes weight: [T, out, in]. bias: [T, out], or None. Both start as zeros.
    """

    def __init__(self, num_tasks: int, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_tasks, out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(num_tasks, out_features)) if bias else None


class PerLayer(nn.ModuleDict):
    """Dictionary with a PerTaskLinear for each number in `layers`; `at` returns one of them."""

    def __init__(
        self, layers: Iterable[int], num_tasks: int, in_features: int, out_features: int, *, bias: bool = False
    ) -> None:
        super().__init__(
            {str(layer): PerTaskLinear(num_tasks, in_features, out_features, bias=bias) for layer in layers}
        )

    def at(self, layer: int) -> PerTaskLinear:
        return cast(PerTaskLinear, self[str(layer)])

    def all(self) -> list[PerTaskLinear]:
        return cast(list[PerTaskLinear], list(self.values()))
