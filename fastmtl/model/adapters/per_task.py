"""Linear maps of which every task has its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn


class Owner(nn.Module):
    """A module whose parameters `within` makes readable."""

    def forward(self, x: Tensor, *, call: Callable[[Tensor], Tensor]) -> Tensor:
        return call(x)


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


def within(owners: Iterable[Owner], x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
    """call(x), an operation on the parameters of several modules at once.

    Under ZeRO 3 a parameter has storage only while its own module runs. So each owner runs around the next, the rows
    going in and out, and the last around `call`, which may then read the parameters of all.
    """
    for owner in owners:
        call = partial(owner, call=call)
    return call(x)
