"""Attention over packed sequences: the public operation, which validates, picks an implementation and calls it.

    P = softmax(softmax_scale * Q K^T)    over the keys of the query's own sequence
    O = (keep * P / (1 - dropout_p)) V    keep[query, key] drawn by a counter generator from `seed`

qkv [N, 3, heads, head_dim]; cu_seqlens [B + 1]. varlen_attention_reference defines every value, which entries dropout
keeps among them: all implementations drop the same ones.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastmtl_kernels import varlen_attention_reference as reference
from fastmtl_kernels.varlen_attention_plan import check_cu_seqlens

Impl = Literal["auto", "reference"]


def varlen_attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    *,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Attention of every token over its own sequence, differentiable in qkv.

    Args:
        qkv: [N, 3, heads, head_dim], floating point, any strides. Rows past cu_seqlens[-1] belong to no sequence:
            output and gradient are zero there, whatever they hold.
        cu_seqlens: [B + 1] int32 on qkv's device, from 0 ascending to at most N; sequences may be empty.
        softmax_scale: what the scores are multiplied with; None means head_dim ** -0.5.
        dropout_p: the probability of dropping an entry of P, in [0, 1).
        seed: int64 of one element on qkv's device; needed where dropout_p > 0. Equal seeds drop equal entries.
        impl: "auto" or "reference" (plain torch, copies cu_seqlens to the host).

    Returns:
        [N, heads, head_dim] of qkv's dtype.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or values; the message names it.
    """
    _check(qkv, cu_seqlens, softmax_scale, dropout_p, seed)
    if impl not in ("auto", "reference"):
        raise ValueError(f"impl must be 'auto' or 'reference', got {impl!r}")
    scale = qkv.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    offsets = cu_seqlens.tolist()
    check_cu_seqlens(offsets, qkv.shape[0])
    return reference.varlen_attention(qkv, offsets, scale, dropout_p, seed)


def _check(qkv: Tensor, cu_seqlens: Tensor, softmax_scale: float | None, dropout_p: float, seed: Tensor | None) -> None:
    """Raises a ValueError that names the argument whose type, shape, dtype or device is wrong; reads no tensor."""
    if not isinstance(qkv, Tensor) or qkv.dim() != 4 or qkv.shape[1] != 3 or not qkv.is_floating_point():
        raise ValueError(f"qkv must be floating point of shape [N, 3, heads, head_dim], got {_describe(qkv)}")
    if qkv.shape[2] == 0 or qkv.shape[3] == 0:
        raise ValueError(f"qkv must have at least one head and head_dim >= 1, got {_describe(qkv)}")
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
        raise ValueError(f"cu_seqlens must be an int32 tensor of shape [B + 1], got {_describe(cu_seqlens)}")
    if cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens must be int32, got {cu_seqlens.dtype}; convert it with .int()")
    if cu_seqlens.device != qkv.device:
        raise ValueError(f"cu_seqlens must be on {qkv.device} like qkv, got {cu_seqlens.device}")
    if softmax_scale is not None and not float("-inf") < softmax_scale < float("inf"):
        raise ValueError(f"softmax_scale must be finite, or None for head_dim ** -0.5, got {softmax_scale}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if dropout_p > 0 and seed is None:
        raise ValueError("seed must be an int64 tensor of one element where dropout_p > 0, got None")
    if seed is not None:
        if not isinstance(seed, Tensor) or seed.dtype != torch.int64 or seed.numel() != 1:
            raise ValueError(f"seed must be an int64 tensor of one element, got {_describe(seed)}")
        if seed.device != qkv.device:
            raise ValueError(f"seed must be on {qkv.device} like qkv, got {seed.device}")


def _describe(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
