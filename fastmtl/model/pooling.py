"""One vector per sequence, by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastmtl.data.packed_batch import PackedBatch
from fastmtl.errors import unknown_name

# Hidden states [N, d] of a batch of B sequences -> [B, d].
Pooling = Callable[[Tensor, PackedBatch], Tensor]


def cls(hidden: Tensor, batch: PackedBatch) -> Tensor:
    """The first token's hidden state."""
    return hidden.index_select(0, batch.cu_seqlens[:-1])


def mean(hidden: Tensor, batch: PackedBatch) -> Tensor:
    """The mean over all tokens, special ones included; summed in fp32."""
    # unsafe: the offsets were checked on the host when the batch was packed; checking them here would wait for the
    # device
    lengths = batch.cu_seqlens.diff()
    summed = torch.segment_reduce(hidden.float(), "sum", lengths=lengths, unsafe=True)
    return (summed / lengths[:, None]).to(hidden.dtype)


POOLINGS: dict[str, Pooling] = {"cls": cls, "mean": mean}


def pooling(name: str) -> Pooling:
    """Raises UserError for an unknown name."""
    if name not in POOLINGS:
        raise unknown_name("pooling", name, POOLINGS)
    return POOLINGS[name]
