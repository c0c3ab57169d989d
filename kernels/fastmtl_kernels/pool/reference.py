"""Reference of pooling in plain torch: it defines the result and runs on any device.

    cls   out[b] = x[first row of b]
    mean  out[b] = sum of the rows of b / their number
    max   out[b] = the largest value of each column; its gradient goes to the first row that has it

Sequence b is rows cu_seqlens[b]:cu_seqlens[b + 1] of x [N, d]; an empty one gives zeros. Any
floating dtype; arithmetic in float32, in float64 for float64. Rows past cu_seqlens[-1] belong to no
sequence: their gradients are zero. Gradients by autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pool(x: Tensor, offsets: list[int], mode: str) -> Tensor:
    """Return out [B, d] of x's dtype. offsets: cu_seqlens as integers."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    chunks = wide[: offsets[-1]].split([b - a for a, b in zip(offsets, offsets[1:], strict=False)])
    # An empty part of x: the result is then differentiable even if there is no sequence.
    pooled = [wide[:0].sum(0, keepdim=True)[:0]]
    for chunk in chunks:
        if not len(chunk):
            pooled.append(chunk.sum(0, keepdim=True))
        elif mode == "cls":
            pooled.append(chunk[:1])
        elif mode == "mean":
            pooled.append(chunk.mean(0, keepdim=True))
        else:
            pooled.append(chunk.max(0, keepdim=True).values)
    return torch.cat(pooled).to(x.dtype)
