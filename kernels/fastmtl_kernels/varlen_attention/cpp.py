"""Attention over packed sequences by the C++ kernels of csrc/varlen_attention_cpu.cpp.

    S = softmax_scale * Q K^T, only within a sequence      dV = (Z P)^T dO
    P = softmax(S)                                         dP = Z (dO V^T)
    O = (Z P) V, Z = keep / (1 - dropout_p)                dS = P (dP - rowsum(P dP))
                                                           dQ = softmax_scale * dS K
                                                           dK = softmax_scale * dS^T Q

When position terms are given (see the reference), Q and K are rotated when they are loaded, and dQ
and dK back when they are stored. Blocks of keys outside the window are skipped. S gets the bias,
whose gradient is the sum of dS over each diagonal, per group of sequences.

qkv [N, 3, heads, head_dim], float32, bfloat16 or float16, any head_dim; arithmetic in float32. No
sequence is padded. Forward keeps, for each row of S, the largest score and the inverse of the sum
of the softmax, [N, heads, 2]; P and the dropout mask are recomputed in backward. Equal inputs give
equal bits for any number of threads. Not differentiable twice.

Source: see fastmtl_kernels.varlen_attention.reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastmtl_kernels.philox import keep_threshold
from fastmtl_kernels.varlen_attention.position_terms import PositionTerms


class _VarlenAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        cu_seqlens: Tensor,
        scale: float,
        dropout_p: float,
        seed: Tensor | None,
        window: int,
        rotary: Tensor | None,
        bias: Tensor | None,
        bias_offsets: Tensor | None,
    ) -> Tensor:
        num_rows, _, num_heads, head_dim = qkv.shape
        out = torch.empty(num_rows, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
        stats = torch.empty(num_rows, num_heads, 2, dtype=torch.float32, device=qkv.device)
        ctx.numbers = keep_threshold(dropout_p), 1 / (1 - dropout_p), scale
        ctx.window = window
        torch.ops.fastmtl.varlen_attention_out(
            qkv, cu_seqlens, seed, *ctx.numbers, out, stats, window, rotary, bias, bias_offsets
        )
        ctx.save_for_backward(qkv, stats, cu_seqlens, seed, rotary, bias, bias_offsets)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        qkv, stats, cu_seqlens, seed, *terms = ctx.saved_tensors
        dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
        dbias = torch.empty_like(terms[1]) if ctx.needs_input_grad[7] else None
        torch.ops.fastmtl.varlen_attention_backward_out(
            _with_unit_stride(dout), qkv, stats, cu_seqlens, seed, *ctx.numbers, dqkv, ctx.window, *terms, dbias
        )
        return dqkv, None, None, None, None, None, None, dbias, None


def varlen_attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    softmax_scale: float,
    dropout_p: float,
    seed: Tensor | None,
    terms: PositionTerms,
) -> Tensor:
    """Return O [N, heads, head_dim] of qkv's dtype."""
    seed = seed if dropout_p > 0 else None
    rotary, bias, offsets = terms.rotary, terms.bias, terms.bias_offsets
    return _VarlenAttention.apply(
        _with_unit_stride(qkv),
        cu_seqlens.contiguous(),
        softmax_scale,
        dropout_p,
        seed,
        -1 if terms.window is None else min(terms.window, len(qkv)),
        None if rotary is None else rotary.contiguous(),
        None if bias is None else bias.float().contiguous(),
        None if offsets is None else offsets.contiguous(),
    )


def _with_unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
