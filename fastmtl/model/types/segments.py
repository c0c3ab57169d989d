"""Operations over the units of each example: softmax and sums of segments."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.data.packed_batch import Units


def segment_sum(x: Tensor, units: Units) -> Tensor:
    """Return the sum of each example's units, [E, ...]. x: [U, ...]."""
    return x.new_zeros(len(units.host) - 1, *x.shape[1:]).index_add(0, units.example, x)


def segment_log_softmax(x: Tensor, units: Units) -> Tensor:
    """Return the log-softmax over the units of each example, [U, ...]. x: [U, ...]."""
    examples = len(units.host) - 1
    index = units.example.reshape(-1, *[1] * (x.dim() - 1)).expand_as(x)
    with torch.no_grad():
        largest = x.new_full((examples, *x.shape[1:]), -torch.inf).scatter_reduce(0, index, x, "amax")
    shifted = x - largest[units.example]
    return shifted - segment_sum(shifted.exp(), units).log()[units.example]
