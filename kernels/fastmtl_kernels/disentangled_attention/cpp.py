"""Disentangled attention over packed sequences by the C++ kernels of csrc/.

    S as in fastmtl_kernels.disentangled_attention.reference     dV, dP, dS as for varlen_attention
    dQ = softmax_scale (dS K + rows of (dS by distance) PK)
    dK = softmax_scale (dS^T Q + columns of (dS by distance) PQ)
    dPK[row] = softmax_scale * sum of dS[i, j] Q[i] over row(i - j) = row
    dPQ[row] = softmax_scale * sum of dS[i, j] K[j] over row(i - j) = row

qkv [N, 3, heads, head_dim], float32, bfloat16 or float16, any head_dim; arithmetic in float32. No
sequence is padded. The kernels copy the tables to rows by distance, so that the entries of one row
of scores are adjacent; nothing of size length^2 is stored. Forward keeps the statistics of the
softmax, [N, heads, 2]; P and the dropout mask are recomputed in backward. Equal inputs give equal
bits for any number of threads. Not differentiable twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastmtl_kernels.philox import keep_threshold


class _DisentangledAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        pos_key: Tensor | None,
        pos_query: Tensor | None,
        cu_seqlens: Tensor,
        position_rows: Tensor,
        group_offsets: Tensor | None,
        scale: float,
        dropout_p: float,
        seed: Tensor | None,
    ) -> Tensor:
        num_rows, _, num_heads, head_dim = qkv.shape
        out = torch.empty(num_rows, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
        stats = torch.empty(num_rows, num_heads, 2, dtype=torch.float32, device=qkv.device)
        ctx.numbers = keep_threshold(dropout_p), 1 / (1 - dropout_p), scale
        rest = cu_seqlens, position_rows, pos_key, pos_query, group_offsets, seed
        torch.ops.fastmtl.disentangled_attention_out(qkv, *rest, *ctx.numbers, out, stats)
        ctx.save_for_backward(qkv, stats, *rest)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        qkv, stats, *rest = ctx.saved_tensors
        dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
        dtables = [None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in rest[2:4]]
        torch.ops.fastmtl.disentangled_attention_backward_out(
            _with_unit_stride(dout), qkv, stats, *rest, *ctx.numbers, dqkv, *dtables
        )
        return dqkv, *dtables, *(None,) * 6


def disentangled_attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    position_rows: Tensor,
    pos_key: Tensor | None,
    pos_query: Tensor | None,
    group_offsets: Tensor | None,
    softmax_scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """Return O [N, heads, head_dim] of qkv's dtype."""
    seed = seed if dropout_p > 0 else None
    pos_key, pos_query = (None if table is None else _with_unit_stride(table) for table in (pos_key, pos_query))
    group_offsets = None if group_offsets is None else group_offsets.contiguous()
    return _DisentangledAttention.apply(
        _with_unit_stride(qkv),
        pos_key,
        pos_query,
        cu_seqlens.contiguous(),
        position_rows.contiguous(),
        group_offsets,
        softmax_scale,
        dropout_p,
        seed,
    )


def _with_unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
