"""Operations over the units of each example: softmax and sums of segments."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from fastmtl.data.packed_batch import Units


def segment_sum(x: Tensor, units: Units) -> Tensor:
    """Return the sum of each example's units, [E, ...]. x: [U, ...]."""
    return x.new_zeros(len(units.host) - 1, *x.shape[1:]).index_add(0, units.example, x)


def padded(x: Tensor, units: Units, fill: float = 0.0) -> Tensor:
    """Return each example's units in a row, [E, most units of an example, ...]. x: [U, ...].

    fill: the value of the places without a unit.
    """
    most = max((stop - start for start, stop in pairwise(units.host)), default=0)
    place = torch.arange(len(x), device=x.device) - units.offsets[units.example]
    return x.new_full((len(units.host) - 1, most, *x.shape[1:]), fill).index_put((units.example, place), x)


def segment_log_softmax(x: Tensor, units: Units) -> Tensor:
    """Return the log-softmax over the units of each example, [U, ...]. x: [U, ...]."""
    examples = len(units.host) - 1
    index = units.example.reshape(-1, *[1] * (x.dim() - 1)).expand_as(x)
    with torch.no_grad():
        largest = x.new_full((examples, *x.shape[1:]), -torch.inf).scatter_reduce(0, index, x, "amax")
    shifted = x - largest[units.example]
    return shifted - segment_sum(shifted.exp(), units).log()[units.example]


def segment_divergence(p: Tensor, q: Tensor, units: Units) -> Tensor:
    """Return KL(p, q) + KL(q, p) of the softmax over each example's units, [E]. p, q: [U]."""
    log_p, log_q = segment_log_softmax(p, units), segment_log_softmax(q, units)
    return segment_sum((log_p.exp() - log_q.exp()) * (log_p - log_q), units)
