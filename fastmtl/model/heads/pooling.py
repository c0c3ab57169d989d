"""One vector per sequence, by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fastmtl.data.packed_batch import PackedBatch
from fastmtl.errors import unknown_name
from fastmtl_kernels import pool

# Hidden states [N, d] of a batch of B sequences -> [B, d].
Pooling = Callable[[Tensor, PackedBatch], Tensor]


def cls(hidden: Tensor, batch: PackedBatch) -> Tensor:
    """The first token's hidden state."""
    return pool(hidden, batch.cu_seqlens, mode="cls")


def mean(hidden: Tensor, batch: PackedBatch) -> Tensor:
    """The mean over all tokens, special ones included; summed in fp32."""
    return pool(hidden, batch.cu_seqlens, mode="mean")


def maximum(hidden: Tensor, batch: PackedBatch) -> Tensor:
    """The largest value of each column over all tokens, special ones included."""
    return pool(hidden, batch.cu_seqlens, mode="max")


# What `pooler` gives is then mapped by the encoder's pooler, tanh(W x + b).
POOLINGS: dict[str, Pooling] = {"cls": cls, "mean": mean, "max": maximum, "pooler": cls}


def pooling(name: str) -> Pooling:
    """Raises UserError for an unknown name."""
    if name not in POOLINGS:
        raise unknown_name("pooling", name, POOLINGS)
    return POOLINGS[name]
