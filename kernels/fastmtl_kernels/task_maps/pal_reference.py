"""Plain-torch oracle of projected attention layers: it defines the meaning, and is the portable path.

    e = x down_t + down_bias_t                       for the rows of task t
    [Q, K, V] = e qkv_t + qkv_bias_t                 each [N, heads, s / heads]
    z = softmax(Q K^T / sqrt(s / heads)) V           within each sequence; dropout of the probabilities
    y = dropout(activation(z up_t + up_bias_t))

x, y [N, d]; down [T, d, s], qkv [T, s, 3 s], up [T, s, d], down_bias [T, s], qkv_bias [T, 3 s], up_bias [T, d]. Any
floating dtypes; float32 inside, float64 where x is float64; y has x's dtype. Attention and its dropout are those of
varlen_attention_reference, dropout of y is that of low_rank_reference: the same seed serves both, since their counters
differ. Rows past the last token offset are zero in y and in the gradients, whatever they hold. Gradients by autograd.

Source: Stickland & Murray, BERT and PALs, 2019, equations 2 and 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fastmtl_kernels.task_maps.common import Maps
from fastmtl_kernels.task_maps.reference import linear, maps
from fastmtl_kernels.task_sink import TaskRows
from fastmtl_kernels.varlen_attention.reference import varlen_attention


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
    """y [N, d]; the arguments are those of fastmtl_kernels.pal, checked, offsets on the host."""
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
