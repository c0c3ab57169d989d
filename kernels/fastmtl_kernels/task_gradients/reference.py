"""Reference of gramian and combine in plain torch: it defines the results, runs on any device.

    gramian  G[i, j] = sum_p J[i, p] J[j, p]
    combine  out[p]  = sum_t weights[t] J[t, p]

J [T, P] is T lists of K contiguous tensors; tensor k has the same shape and dtype in all of them.
gramian accumulates in float64; combine in float32 (float64 for float64 inputs), task after task.
Limits: none on T, K and P; any floating dtype.

Source: Yu et al., Gradient Surgery for Multi-Task Learning, 2020, in Gramian form.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Columns per step, so that the float copies stay small beside J.
_CHUNK = 1 << 18


def gramian(grads: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return G [T, T], float32, or float64 where every tensor is float64."""
    tensors = [tensor for task in grads for tensor in task]
    device = tensors[0].device if tensors else torch.device("cpu")
    gram = torch.zeros(len(grads), len(grads), dtype=torch.float64, device=device)
    for same in zip(*grads, strict=True):
        for chunks in zip(*(tensor.reshape(-1).split(_CHUNK) for tensor in same), strict=True):
            rows = torch.stack(chunks).double()
            gram += rows @ rows.T
    all_float64 = bool(tensors) and all(tensor.dtype == torch.float64 for tensor in tensors)
    return gram if all_float64 else gram.float()


def combine(grads: Sequence[Sequence[Tensor]], weights: Tensor, out: Sequence[Tensor]) -> None:
    """Write the weighted sum over tasks into `out`.

    out: K contiguous tensors. The sum is rounded once, to their dtype.
    """
    for target, *same in zip(out, *grads, strict=True):
        dtype = torch.promote_types(same[0].dtype, torch.float32)
        columns = [tensor.reshape(-1).split(_CHUNK) for tensor in same]
        for target_chunk, *chunks in zip(target.view(-1).split(_CHUNK), *columns, strict=True):
            merged = torch.zeros(target_chunk.shape, dtype=dtype, device=target.device)
            for weight, chunk in zip(weights.to(dtype).unbind(), chunks, strict=True):
                merged.addcmul_(chunk.to(dtype), weight)
            target_chunk.copy_(merged)
