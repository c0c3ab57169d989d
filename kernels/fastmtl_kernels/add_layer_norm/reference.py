"""Plain-torch oracle of residual LayerNorm and row-wise dropout: it defines the meaning, and is the portable path.

    z = residual + dropout(x + x_bias) + ts
    y = (z - mean(z)) / sqrt(var(z) + eps) * weight + bias        mean and biased variance over the columns

residual, x, ts [N, d]; weight, bias, x_bias [d]. Any floating dtypes; float32 inside, float64 where residual is
float64; z and y have residual's dtype. Dropout keeps what fastmtl_kernels.philox.keep_mask says and multiplies it with
1 / (1 - dropout_p). Rows past the last token offset belong to no task: y and the gradients are zero there, whatever
they hold. Gradients by autograd; those of a task's rows go to the sink by giving every task a copy of the parameters.

Source: Ba et al., Layer Normalization, 2016; Devlin et al., BERT, 2019 (the order of bias, dropout, sum and norm).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl_kernels.philox import keep_mask
from fastmtl_kernels.task_sink import TaskRows, TaskSink, per_task


def add_layer_norm(
    residual: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    ts: Tensor | None,
    x_bias: Tensor | None,
    dropout_p: float,
    eps: float,
    seed: Tensor | None,
    tasks: TaskRows,
    task_grads: TaskSink | None,
) -> Tensor:
    """y [N, d]; the arguments are those of fastmtl_kernels.add_layer_norm, checked."""
    dtype = torch.promote_types(residual.dtype, torch.float32)
    stop = tasks.host[-1]
    task_of_row = task_index(tasks)
    f = x[:stop].to(dtype)
    if x_bias is not None:
        f = f + per_task(x_bias, tasks.num_tasks, dtype, task_grads)[task_of_row]
    z = residual[:stop].to(dtype) + dropout(f, dropout_p, seed)
    if ts is not None:
        z = z + ts[:stop].to(dtype)
    y = layer_norm(z.to(residual.dtype).to(dtype), weight, bias, eps, tasks, task_grads)
    return torch.cat([y.to(residual.dtype), zeros_like_tail(residual, stop)])


def layer_norm(
    z: Tensor, weight: Tensor, bias: Tensor, eps: float, tasks: TaskRows, task_grads: TaskSink | None
) -> Tensor:
    """Of the rows that belong to tasks, in the dtype of z."""
    task_of_row = task_index(tasks)
    centred = z - z.mean(-1, keepdim=True)
    normalised = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    weights, biases = (per_task(parameter, tasks.num_tasks, z.dtype, task_grads) for parameter in (weight, bias))
    return normalised * weights[task_of_row] + biases[task_of_row]


def dropout(x: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """x [N, d] with its kept elements times 1 / (1 - dropout_p), zeros elsewhere, in x's dtype."""
    if seed is None or dropout_p == 0:
        return x
    keep = keep_mask(seed, x.shape[0], x.shape[1], dropout_p)
    return (x * (1 / (1 - dropout_p))).masked_fill(~keep, 0.0)


def task_index(tasks: TaskRows) -> Tensor:
    """The task of every row that has one, int64 [token_offsets[-1]]."""
    sizes = tasks.offsets.diff()
    return torch.arange(tasks.num_tasks, device=sizes.device).repeat_interleave(sizes, output_size=tasks.host[-1])


def zeros_like_tail(rows: Tensor, stop: int) -> Tensor:
    """Zeros [N - stop, d]. Filled rather than made anew, so that a result without any row has a gradient."""
    return rows[stop:].masked_fill(torch.ones((), dtype=torch.bool, device=rows.device), 0.0)
