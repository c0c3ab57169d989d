"""The public operation for attention over packed sequences.

It checks the arguments, selects an implementation and calls it.

    P = softmax(softmax_scale * Q K^T)    over the keys of the query's own sequence
    O = (keep * P / (1 - dropout_p)) V    keep[query, key] drawn by a counter generator from `seed`

Optional: Q and K are rotated by their places, a bias by relative position is added to the scores,
and keys outside a window are skipped.

qkv [N, 3, heads, head_dim]; cu_seqlens [B + 1]. fastmtl_kernels.varlen_attention.reference defines
every value, and the entries that dropout keeps: all implementations drop the same ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl_kernels.checks import check_dropout, describe
from fastmtl_kernels.dispatch import RowImpl, select
from fastmtl_kernels.varlen_attention import cpp, reference
from fastmtl_kernels.varlen_attention.plan import AttentionPlan, check_cu_seqlens
from fastmtl_kernels.varlen_attention.position_terms import PositionTerms


def varlen_attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    *,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    impl: RowImpl = "auto",
    plan: AttentionPlan | None = None,
    window: int | None = None,
    rotary: Tensor | None = None,
    bias: Tensor | None = None,
    bias_offsets: Tensor | None = None,
) -> Tensor:
    """Return the attention of every token over its own sequence, differentiable in qkv and bias.

    A place is the index of a token in its sequence.

    Args:
        qkv: [N, 3, heads, head_dim], floating point, any strides. Rows past cu_seqlens[-1] belong
            to no sequence: output and gradient are zero there, whatever qkv contains.
        cu_seqlens: [B + 1] int32 on qkv's device, ascending from 0 to at most N; sequences may be
            empty.
        softmax_scale: the factor of the scores; None means head_dim ** -0.5.
        dropout_p: the probability of dropping an entry of P, in [0, 1).
        seed: int64 of one element on qkv's device; needed where dropout_p > 0. Equal seeds drop
            equal entries.
        impl: "auto", "reference" (plain torch, reads cu_seqlens on the host), "cpp" (CPU tensors)
            or "triton" (CUDA tensors; float16 and bfloat16 with head_dim up to 128, float32 up to
            64).
        plan: the result of AttentionPlan.make for cu_seqlens and the rows and device of qkv; one
            plan serves all layers of a batch. Only the Triton kernels need it. If it is None,
            cu_seqlens is copied to the host to make one, which waits for the GPU. With a plan, the
            Triton kernels do not compare rotary, bias and bias_offsets with the sequences: places
            and distances that these lack give NaN.
        window: the query at place i sees the keys at the places j with |i - j| <= window; None for
            all keys of the sequence.
        rotary: [2, P, head_dim // 2], cosines and sines, on qkv's device; float64 for float64 qkv,
            else float32; without a gradient. P is at least the length of the longest sequence. The
            rows of Q and K at place i become [x1 cos - x2 sin, x2 cos + x1 sin], with cos and sin
            of row i, and x1, x2 the halves of their columns. None for no rotation.
        bias: [G, heads, 2 R - 1], floating point, on qkv's device. R is at least the length of the
            longest sequence. bias[g, head, j - i + R - 1] is added to the score of query i and key
            j, after softmax_scale, in sequences of group g. None for no bias.
        bias_offsets: [G + 1] int32 on qkv's device, ascending from 0 to B: sequences
            bias_offsets[g]:bias_offsets[g + 1] are group g. None where G is 1.

    Returns:
        [N, heads, head_dim] of qkv's dtype.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or values; the message names it.
        RuntimeError: the implementation is not available here; the message gives the reason.
    """
    _check(qkv, cu_seqlens, softmax_scale, plan)
    terms = PositionTerms(window, rotary, bias, bias_offsets)
    terms.check(qkv)
    check_dropout(dropout_p, seed, qkv.device)
    scale = qkv.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    chosen = select("varlen_attention", impl, qkv, head_dim=qkv.shape[-1])
    if chosen == "triton":
        from fastmtl_kernels.varlen_attention.triton import launch

        if plan is None:
            offsets = cu_seqlens.tolist()
            plan = AttentionPlan.make(offsets, qkv.shape[0], qkv.device)
            terms.check_values(offsets)
        return launch.varlen_attention(qkv, plan, scale, dropout_p, seed, terms, terms.group_rows(cu_seqlens))
    offsets = cu_seqlens.tolist()
    check_cu_seqlens(offsets, qkv.shape[0])
    if terms.given:
        terms.check_values(offsets)
    if chosen == "cpp":
        return cpp.varlen_attention(qkv, cu_seqlens, scale, dropout_p, seed, terms)
    return reference.varlen_attention(qkv, offsets, scale, dropout_p, seed, terms)


def _check(qkv: Tensor, cu_seqlens: Tensor, softmax_scale: float | None, plan: AttentionPlan | None) -> None:
    """Check types, shapes, dtypes and devices, without reading a tensor.

    Raises:
        ValueError: names the wrong argument.
    """
    if not isinstance(qkv, Tensor) or qkv.dim() != 4 or qkv.shape[1] != 3 or not qkv.is_floating_point():
        raise ValueError(f"qkv must be floating point of shape [N, 3, heads, head_dim], got {describe(qkv)}")
    if qkv.shape[2] == 0 or qkv.shape[3] == 0:
        raise ValueError(f"qkv must have at least one head and head_dim >= 1, got {describe(qkv)}")
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
        raise ValueError(f"cu_seqlens must be an int32 tensor of shape [B + 1], got {describe(cu_seqlens)}")
    if cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens must be int32, got {cu_seqlens.dtype}; convert it with .int()")
    if cu_seqlens.device != qkv.device:
        raise ValueError(f"cu_seqlens must be on {qkv.device} like qkv, got {cu_seqlens.device}")
    if softmax_scale is not None and not float("-inf") < softmax_scale < float("inf"):
        raise ValueError(f"softmax_scale must be finite, or None for head_dim ** -0.5, got {softmax_scale}")
    if plan is not None:
        if not isinstance(plan, AttentionPlan):
            raise ValueError(f"plan must be an AttentionPlan, got {plan!r}")
        if plan.num_rows != qkv.shape[0] or plan.blocks.device != qkv.device:
            raise ValueError(
                f"plan must be for the {qkv.shape[0]} rows of qkv on {qkv.device}, "
                f"got one for {plan.num_rows} rows on {plan.blocks.device}"
            )
