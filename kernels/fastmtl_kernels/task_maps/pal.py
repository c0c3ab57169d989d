"""Projected attention layers (PALs) of all tasks in one operation, on packed rows.

    e = x down_t + down_bias_t                       for the rows of task t
    [Q, K, V] = e qkv_t + qkv_bias_t                 each [N, heads, s / heads]
    z = softmax(Q K^T / sqrt(s / heads)) V           within each sequence; dropout of softmax
    y = dropout(activation(z up_t + up_bias_t))

x, y [N, d]; down [T, d, s], qkv [T, s, 3 s], up [T, s, d]. The layer is three operations: the maps
`down` and `qkv` together (fastmtl_kernels.task_maps.function; e is kept for backward); attention
(fastmtl_kernels.varlen_attention); the map `up` with activation and dropout. In forward, Triton
runs each of the three as one launch, attention as two if there are short and long sequences.
fastmtl_kernels.task_maps.reference defines every value.

Source: Stickland & Murray, BERT and PALs, 2019, equations 2 and 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl_kernels.checks import check_dropout, describe
from fastmtl_kernels.dispatch import select
from fastmtl_kernels.task_maps import reference
from fastmtl_kernels.task_maps.common import (
    Activation,
    Impl,
    check_activation,
    check_parameter,
    check_rows,
    task_rates,
    to_autocast,
)
from fastmtl_kernels.task_maps.function import maps
from fastmtl_kernels.task_sink import TaskRows, TokenOffsets
from fastmtl_kernels.varlen_attention.api import varlen_attention
from fastmtl_kernels.varlen_attention.plan import AttentionPlan, check_cu_seqlens


def pal(
    x: Tensor,
    down: Tensor,
    qkv: Tensor,
    up: Tensor,
    cu_seqlens: Tensor,
    token_offsets: TokenOffsets,
    *,
    num_heads: int,
    down_bias: Tensor | None = None,
    qkv_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    activation: Activation = "identity",
    dropout_p: float = 0.0,
    out_dropout_p: float | Sequence[float] | None = None,
    seed: Tensor | None = None,
    impl: Impl = "auto",
    plan: AttentionPlan | None = None,
) -> Tensor:
    """Return the output of the projected attention layers, differentiable in x and all parameters.

    Args:
        x: [N, d], floating point, any strides.
        down: [T, d, s]. Parameters of another dtype than x's are converted. down, qkv and up may be
            transposed views: a view of a tensor [T, s, d] is as fast, and its gradient has the same
            strides.
        qkv: [T, s, 3 s]: s columns for queries, s for keys and s for values; in each, the heads are
            one after the other.
        up: [T, s, d].
        cu_seqlens: [B + 1] int32 on x's device, the sequences as in varlen_attention; all rows of a
            sequence must belong to one task.
        token_offsets: the rows of each task, as in low_rank. Rows past the last offset are zeros in
            y and in x's gradient.
        num_heads: number of attention heads; s must be a multiple of it.
        down_bias: [T, s].
        qkv_bias: [T, 3 s].
        up_bias: [T, d].
        activation: "identity", "gelu" (by erf) or "relu", after the map up.
        dropout_p: the probability of dropping an attention probability, in [0, 1).
        out_dropout_p: the probability of dropping an element of y, in [0, 1): one number, or one
            for each task.
        seed: int64 of one element on x's device; needed if any probability of dropout is not 0.
            Each call in a step needs its own seed, since equal seeds drop equal elements.
        impl: "auto", "reference", "torch" (matrix products by torch, attention by the
            implementation that "auto" gives varlen_attention) or "triton" (CUDA tensors, s <= 256,
            in float32 s <= 64; head sizes as in varlen_attention).
        plan: the AttentionPlan of cu_seqlens for the Triton kernels, as in varlen_attention.

    Returns:
        y [N, d] of x's dtype.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value; the message names it.
        RuntimeError: the implementation is not available here; the message gives the reason.
    """
    check_rows(x)
    tasks = TaskRows.make(token_offsets, x.shape[0], x.device)
    num_tasks, columns = tasks.num_tasks, x.shape[1]
    check_parameter("down", down, (num_tasks, columns, None), x, "[T, d, s]")
    size = down.shape[2]
    check_parameter("qkv", qkv, (num_tasks, size, 3 * size), x, "[T, s, 3 s]")
    check_parameter("up", up, (num_tasks, size, columns), x, "[T, s, d]")
    for name, bias, width in (("down_bias", down_bias, size), ("qkv_bias", qkv_bias, 3 * size)):
        if bias is not None:
            check_parameter(name, bias, (num_tasks, width), x, f"[T, {'s' if width == size else '3 s'}]")
    if up_bias is not None:
        check_parameter("up_bias", up_bias, (num_tasks, columns), x, "[T, d]")
    if not isinstance(num_heads, int) or num_heads < 1 or size % num_heads:
        raise ValueError(f"num_heads must divide the {size} columns of down, got {num_heads!r}")
    check_activation(activation)
    check_dropout(dropout_p, seed, x.device)
    rates = task_rates("out_dropout_p", out_dropout_p, num_tasks, seed, x.device)
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1:
        raise ValueError(f"cu_seqlens must be an int32 tensor of shape [B + 1], got {describe(cu_seqlens)}")
    x = to_autocast(x)
    chosen = select("pal", impl, x, rank=size, head_dim=size // num_heads)
    down, qkv, up = (parameter.to(x.dtype) for parameter in (down, qkv, up))
    down_bias, qkv_bias, up_bias = (None if b is None else b.to(x.dtype) for b in (down_bias, qkv_bias, up_bias))
    if chosen == "reference":
        offsets = cu_seqlens.tolist()
        check_cu_seqlens(offsets, x.shape[0])
        with torch.autocast(x.device.type, enabled=False):
            return reference.pal(
                x, down, qkv, up, offsets, tasks, num_heads=num_heads, down_bias=down_bias, qkv_bias=qkv_bias,
                up_bias=up_bias, activation=activation, dropout_p=dropout_p, rates=rates, seed=seed,
            )  # fmt: skip
    projected = maps(x, down, down_bias, qkv, qkv_bias, tasks=tasks, impl=chosen)
    z = varlen_attention(
        projected.unflatten(1, (3, num_heads, -1)),
        cu_seqlens,
        dropout_p=dropout_p,
        seed=seed,
        impl="triton" if chosen == "triton" else "auto",
        plan=plan,
    ).flatten(1)
    return maps(z, None, None, up, up_bias, tasks=tasks, impl=chosen, last=activation, rates=rates, seed=seed)
