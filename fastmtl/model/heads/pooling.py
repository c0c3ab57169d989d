"""Poolings by name: one vector per sequence."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fastmtl.data.packed_batch import PackedBatch
from fastmtl.errors import unknown_name
from fastmtl_kernels import pool

# Hidden states [N, d] of a batch of B sequences -> [B, d].
Pooling = Callable[[Tensor, PackedBatch], Tensor]


def cls(hidden: Tensor, batch: PackedBatch) -> Tensor:
    """Return the hidden state of each first token."""
    return pool(hidden, batch.cu_seqlens, mode="cls")


def mean(hidden: Tensor, batch: PackedBatch) -> Tensor:
    """Return the mean over all tokens, including special ones, summed in fp32."""
    return pool(hidden, batch.cu_seqlens, mode="mean")


def maximum(hidden: Tensor, batch: PackedBatch) -> Tensor:
    """Return the maximum of each column over all tokens, including special ones."""
    return pool(hidden, batch.cu_seqlens, mode="max")


# The encoder's pooler, tanh(W x + b), then maps the result of `pooler`.
POOLINGS: dict[str, Pooling] = {"cls": cls, "mean": mean, "max": maximum, "pooler": cls}


def pooling(name: str) -> Pooling:
    """Return a pooling by name. Raises UserError for an unknown name."""
    if name not in POOLINGS:
        raise unknown_name("pooling", name, POOLINGS)
    return POOLINGS[name]
