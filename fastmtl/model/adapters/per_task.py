"""Linear maps with a weight per task."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import nn

from fastmtl.model.owners import Owner


class PerTaskLinear(Owner):
    """y = x W_t^T + b_t. Attributes weight [T, out, in], bias [T, out]: zero until initialised."""

    def __init__(self, num_tasks: int, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_tasks, out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(num_tasks, out_features)) if bias else None


class PerLayer(nn.ModuleDict):
    """PerTaskLinear of each layer in `layers`."""

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
