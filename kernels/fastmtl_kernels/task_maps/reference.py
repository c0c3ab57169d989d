"""Reference of low_rank, lora and pal in plain torch: it defines their results.

    z = middle(x first_t + first_bias_t)      z = x where there is no first map
    y = dropout(last(z second_t + second_bias_t))

x [N, d_in], first [T, d_in, r], first_bias [T, r], second [T, r, d_out], second_bias [T, d_out],
for the rows of task t. Any floating dtypes; arithmetic in float32, in float64 where x is float64; y
has x's dtype. Dropout has a probability p_t for each task. It keeps the elements that
fastmtl_kernels.philox.keep_mask of all N rows keeps, and multiplies them by 1 / (1 - p_t). Rows
past the last token offset belong to no task: y and the gradients are zero there, whatever the
inputs contain. Gradients by autograd.

Source: Stickland & Murray, BERT and PALs, 2019 (low-rank layers and projected attention layers);
Hu et al., LoRA, 2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmtl_kernels.philox import keep_mask
from fastmtl_kernels.task_maps.common import Maps
from fastmtl_kernels.task_sink import TaskRows
from fastmtl_kernels.varlen_attention.reference import varlen_attention


def maps(
    x: Tensor,
    first: Tensor | None,
    first_bias: Tensor | None,
    second: Tensor,
    second_bias: Tensor | None,
    seed: Tensor | None,
    call: Maps,
) -> Tensor:
    """Return y [N, d_out]; the arguments are those of fastmtl_kernels.task_maps.function.maps."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    parts = []
    for task, (start, stop) in enumerate(pairwise(call.tasks.host)):
        z = x[start:stop].to(dtype)
        if first is not None:
            z = activate(linear(z, first, first_bias, task), call.middle)
        y = activate(linear(z, second, second_bias, task), call.last)
        if seed is not None and call.rates[task] > 0:
            keep = keep_mask(seed, stop, y.shape[1], call.rates[task])[start:]
            y = (y * (1 / (1 - call.rates[task]))).masked_fill(~keep, 0.0)
        parts.append(y)
    # Computed from x, so that the result is differentiable even if no row has a task.
    tail = x[call.tasks.host[-1] :, :1].to(dtype).masked_fill(torch.ones((), dtype=torch.bool, device=x.device), 0.0)
    return torch.cat([*parts, tail.expand(-1, second.shape[2])]).to(x.dtype)


def pal(
    x: Tensor,
    down: Tensor,
    qkv: Tensor,
    up: Tensor,
    cu_seqlens: Sequence[int],
    tasks: TaskRows,
    *,
    num_heads: int,
    down_bias: Tensor | None,
    qkv_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
    dropout_p: float,
    rates: tuple[float, ...],
    seed: Tensor | None,
) -> Tensor:
    """Return y [N, d], the output of the projected attention layers.

        e = x down_t + down_bias_t                       for the rows of task t
        [Q, K, V] = e qkv_t + qkv_bias_t                 each [N, heads, s / heads]
        z = softmax(Q K^T / sqrt(s / heads)) V           within each sequence
        y = dropout(activation(z up_t + up_bias_t))

    The arguments are those of fastmtl_kernels.pal, checked; cu_seqlens as integers. Attention and
    its dropout are those of fastmtl_kernels.varlen_attention.reference; dropout of y is that of
    `maps`. Both use the same seed: the counters of their random numbers differ. Source:
    Stickland & Murray, 2019, equations 2 and 3.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    projected = [
        linear(linear(wide[start:stop], down, down_bias, task), qkv, qkv_bias, task)
        for task, (start, stop) in enumerate(pairwise(tasks.host))
    ]
    projected.append(wide.new_zeros(x.shape[0] - tasks.host[-1], qkv.shape[2]))
    heads = torch.cat(projected).unflatten(1, (3, num_heads, -1))
    z = varlen_attention(heads, cu_seqlens, heads.shape[3] ** -0.5, dropout_p, seed).flatten(1)
    call = Maps(None, tasks, "identity", activation, rates, True)
    return maps(z, None, None, up, up_bias, seed if any(rates) else None, call).to(x.dtype)


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None, task: int) -> Tensor:
    """Return rows weight[task] + bias[task], [n, out], in the dtype of the rows.

    rows: [n, in]. weight: [T, in, out]. bias: [T, out] or None.
    """
    mapped = rows @ weight[task].to(rows.dtype)
    return mapped if bias is None else mapped + bias[task].to(rows.dtype)


def activate(rows: Tensor, activation: str) -> Tensor:
    match activation:
        case "gelu":
            return F.gelu(rows)
        case "relu":
            return F.relu(rows)
        case _:
            return rows
