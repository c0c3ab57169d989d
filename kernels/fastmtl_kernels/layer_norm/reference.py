"""Reference of LayerNorm in plain torch, for those of add_layer_norm and embed_layer_norm.

    y = (z - mean(z)) / sqrt(var(z) + eps) * weight + bias    mean and biased variance over columns

z [n, d] has the n rows that belong to tasks; weight, bias [d], bias may be None. Every task uses
its own copy of the parameters, so that autograd computes one gradient per task for the sink.

Source: Ba et al., Layer Normalization, 2016.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl_kernels.task_sink import TaskRows, TaskSink, per_task


def layer_norm(
    z: Tensor, weight: Tensor, bias: Tensor | None, eps: float, tasks: TaskRows, task_grads: TaskSink | None
) -> Tensor:
    """Return y [n, d] in the dtype of z."""
    task_of_row = task_index(tasks)
    centred = z - z.mean(-1, keepdim=True)
    normalised = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = normalised * per_task(weight, tasks.num_tasks, z.dtype, task_grads)[task_of_row]
    return y if bias is None else y + per_task(bias, tasks.num_tasks, z.dtype, task_grads)[task_of_row]


def task_index(tasks: TaskRows) -> Tensor:
    """Return the index of the task of each row, int64 [n], for the n rows that belong to tasks."""
    sizes = tasks.offsets.diff()
    return torch.arange(tasks.num_tasks, device=sizes.device).repeat_interleave(sizes, output_size=tasks.host[-1])


def zeros_like_tail(rows: Tensor, stop: int) -> Tensor:
    """Return zeros [N - stop, d] in place of the rows stop:N, which belong to no task.

    They are computed from `rows`, so that a result is differentiable even if no row has a task.
    """
    return rows[stop:].masked_fill(torch.ones((), dtype=torch.bool, device=rows.device), 0.0)
