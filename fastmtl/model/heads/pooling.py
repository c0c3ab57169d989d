"""Poolings by name. A pooling maps the hidden states of each sequence to one vector."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fastmtl.data.packed_batch import PackedBatch
from fastmtl.errors import unknown_name
from fastmtl_kernels import pool

# (hidden states [N, d], batch of B sequences) -> vectors [B, d].
Pooling = Callable[[Tensor, PackedBatch], Tensor]


def cls(hidden: Tensor, batch: PackedBatch) -> Tensor:
    """Return the hidden state [B, d] of the first token, [CLS], of each sequence."""
    return pool(hidden, batch.cu_seqlens, mode="cls")


def mean(hidden: Tensor, batch: PackedBatch) -> Tensor:
    """Return the mean [B, d] of each sequence's tokens, special ones included; sums are in fp32."""
    return pool(hidden, batch.cu_seqlens, mode="mean")


def maximum(hidden: Tensor, batch: PackedBatch) -> Tensor:
    """Return each column's maximum [B, d] over a sequence's tokens, special ones included."""
    return pool(hidden, batch.cu_seqlens, mode="max")


# `pooler` is the same as `cls` here; the encoder's pooler, tanh(W x + b), then maps the result.
POOLINGS: dict[str, Pooling] = {"cls": cls, "mean": mean, "max": maximum, "pooler": cls}


def pooling(name: str) -> Pooling:
    """Return the pooling of this name. Raises UserError if there is none."""
    if name not in POOLINGS:
        raise unknown_name("pooling", name, POOLINGS)
    return POOLINGS[name]
