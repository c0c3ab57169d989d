"""Gramian and combination of task gradients by the C++ kernels of csrc/gradients_cpu.cpp and the CUDA ones beside it.

    gramian  G[i, j] = sum_p J[i, p] J[j, p]
    combine  out[p]  = sum_t weights[t] J[t, p]

J [T, P] comes as T lists of K tensors, all on one device. float32, bfloat16 and float16; float32 inner products over
blocks of columns, float64 over blocks; combine in float32. No flat copy is made, J is read once by each operation (on
GPUs for up to 8 tasks), and the result has the same bits for any number of threads and in every run. Limits: up to
MAX_CUDA_TASKS tasks on GPUs. Source: as fastmtl_kernels.task_gradients.reference.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_CUDA_TASKS = 64


def gramian(grads: Sequence[Sequence[Tensor]]) -> Tensor:
    """G [T, T] float32 on the device of the gradients."""
    tensors = [tensor for task in grads for tensor in task]
    # Without a tensor the dispatcher has no device to go by.
    return torch.ops.fastmtl.gramian(tensors, len(grads)) if tensors else torch.zeros(len(grads), len(grads))


def combine(grads: Sequence[Sequence[Tensor]], weights: Tensor, out: Sequence[Tensor]) -> None:
    """Writes the weighted sum over tasks into `out`, K contiguous tensors, float32 or of the dtype of the gradients."""
    tensors = [tensor for task in grads for tensor in task]
    if tensors:
        torch.ops.fastmtl.combine_out(tensors, weights.float().contiguous(), out)
