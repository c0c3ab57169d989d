"""Linear maps of which every task has its own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import nn

from fastmtl.model.owners import Owner


class PerTaskLinear(Owner):
    """y = x W_t^T + b_t. weight [T, out, in], bias [T, out]; both are zero until their owner initialises them."""

    def __init__(self, num_tasks: int, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_tasks, out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(num_tasks, out_features)) if bias else None


class PerLayer(nn.ModuleDict):
    """A PerTaskLinear for each of `layers`."""

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
