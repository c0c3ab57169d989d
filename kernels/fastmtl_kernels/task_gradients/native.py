"""Gramian and combination of task gradients by C++ and CUDA.

The kernels are those of csrc/gradients_cpu.cpp and csrc/gradients.cu.

    gramian  G[i, j] = sum_p J[i, p] J[j, p]
    combine  out[p]  = sum_t weights[t] J[t, p]

J [T, P] is T lists of K tensors on one device, float32, bfloat16 or float16. gramian accumulates in
float32 within a block of columns and in float64 across blocks; combine computes in float32. No flat
copy is made. Each operation reads J once, except gramian on GPUs with more than 8 tasks. The result
has the same bits for any number of threads and in every run. On GPUs there may be at most
dispatch.MAX_CUDA_TASKS tasks.

Source: see fastmtl_kernels.task_gradients.reference.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gramian(grads: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return G [T, T] float32 on the device of the gradients."""
    tensors = [tensor for task in grads for tensor in task]
    # torch selects the kernel by the tensors' device, so an operator cannot be called without any.
    return torch.ops.fastmtl.gramian(tensors, len(grads)) if tensors else torch.zeros(len(grads), len(grads))


def combine(grads: Sequence[Sequence[Tensor]], weights: Tensor, out: Sequence[Tensor]) -> None:
    """Write the weighted sum over tasks into `out`.

    out: K contiguous tensors, float32 or of the gradients' dtype.
    """
    tensors = [tensor for task in grads for tensor in task]
    if tensors:
        torch.ops.fastmtl.combine_out(tensors, weights.float().contiguous(), out)
