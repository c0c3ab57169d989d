"""Reference of residual LayerNorm in plain torch: it defines the result and runs on any device.

    z = residual + dropout(x) + ts
    y = (z - mean(z)) / sqrt(var(z) + eps) * weight + bias    mean and biased variance over columns

residual, x, ts [N, d]; weight, bias [d]; x, ts and bias may be None. Any floating dtypes;
arithmetic in float32, in float64 where residual is float64; z and y have residual's dtype. Dropout
is that of
fastmtl_kernels.dropout.reference. Rows past the last token offset belong to no task: y, z and the
gradients are zero there, whatever the inputs contain. Gradients by autograd.

Source: Ba et al., Layer Normalization, 2016; Devlin et al., BERT, 2019 (the order of dropout, sum
and norm).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl_kernels.dropout.reference import dropout
from fastmtl_kernels.layer_norm.reference import layer_norm, zeros_like_tail
from fastmtl_kernels.task_sink import TaskRows, TaskSink


def add_layer_norm(
    residual: Tensor,
    x: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    ts: Tensor | None,
    dropout_p: float,
    eps: float,
    seed: Tensor | None,
    tasks: TaskRows,
    task_grads: TaskSink | None,
) -> tuple[Tensor, Tensor]:
    """Return y and z [N, d]; the arguments are those of fastmtl_kernels.add_layer_norm, checked."""
    dtype = torch.promote_types(residual.dtype, torch.float32)
    stop = tasks.host[-1]
    z = residual[:stop].to(dtype)
    if x is not None:
        z = z + dropout(x[:stop].to(dtype), dropout_p, seed)
    if ts is not None:
        z = z + ts[:stop].to(dtype)
    z = z.to(residual.dtype)
    y = layer_norm(z.to(dtype), weight, bias, eps, tasks, task_grads)
    tail = zeros_like_tail(residual, stop)
    return torch.cat([y.to(residual.dtype), tail]), torch.cat([z, tail])
