"""Attention over packed sequences by Triton: the launches, forward and backward.

    S = softmax_scale * Q K^T, only within a sequence      dV = (Z P)^T dO
    P = softmax(S)                                         dP = Z (dO V^T)
    O = (Z P) V, Z = keep / (1 - dropout_p)                dS = P (dP - rowsum(P dP))
                                                           dQ = softmax_scale * dS K
                                                           dK = softmax_scale * dS^T Q

qkv [N, 3, heads, head_dim], float16 or bfloat16 with head_dim up to 128, float32 up to 64, padded
to a power of two. Scores, softmax and sums are float32; the operands of the dots have qkv's dtype.
P is recomputed in backward, by one kernel for each kind of sequence (short, long). Each row of a
result is written by one program, without atomics: equal inputs give equal bits.

With a window, keys outside it have no share in P. A bias by relative position is added to S, after
softmax_scale; its gradient is the sum of dS by distance (bias.py). Rotary positions rotate Q and K
before these kernels, and dQ and dK after them (rotary.py).

- Sequences of at most 64 tokens (short.py): a program processes a tile of 64 rows, of one or more
  sequences. It has whole rows of P, so rowsum(P dP) stays in its registers.
- Longer sequences (long.py): a program loops over the 64-row blocks of its sequence. Forward keeps
  the maximum and the sum of each row. A program of backward computes dK and dV of a block of keys,
  or dQ of a block of queries. It reads rowsum(P dP) = rowsum(O dO), which the launch of
  tile_bwd_kernel stores. With a window, the loops skip the blocks that lie outside it.

The two kinds have separate launches: in a common launch, a tile would occupy as many registers and
as much shared memory as a long sequence.

Limits: a value that is not finite makes its whole tile not finite, including other sequences of the
tile. float32 spills registers: it is for checks, not for speed. Not differentiable twice.
Source: Dao, FlashAttention-2, 2023; for dropout see fastmtl_kernels.varlen_attention.reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastmtl_kernels.philox import keep_threshold
from fastmtl_kernels.varlen_attention.plan import TILE, AttentionPlan
from fastmtl_kernels.varlen_attention.position_terms import NO_TERMS, PositionTerms
from fastmtl_kernels.varlen_attention.triton.bias import Bias, BiasSums, bias_arguments, bias_gradient
from fastmtl_kernels.varlen_attention.triton.long import long_fwd_kernel
from fastmtl_kernels.varlen_attention.triton.long_backward import long_bwd_kernel
from fastmtl_kernels.varlen_attention.triton.options import (
    constants,
    long_bwd_options,
    long_fwd_options,
    tile_bwd_options,
)
from fastmtl_kernels.varlen_attention.triton.rotary import rotate_back, rotated
from fastmtl_kernels.varlen_attention.triton.short import tile_fwd_kernel
from fastmtl_kernels.varlen_attention.triton.short_backward import tile_bwd_kernel

_LOG2_E = 1.4426950408889634
# No sequence is as long as this window. Bounds of windows are int32 in the kernels.
_WIDEST_WINDOW = 1 << 24


def _common(
    qkv: Tensor, scale: float, dropout_p: float, seed: Tensor | None, window: int | None, bias: Bias | None
) -> dict[str, Any]:
    return {
        "qkv_ptr": qkv,
        # Without dropout the seed is not read, but the kernel needs some pointer.
        "seed_ptr": qkv if seed is None else seed,
        "stride_qkv_row": qkv.stride(0),
        "stride_qkv_part": qkv.stride(1),
        "stride_qkv_head": qkv.stride(2),
        "num_heads": qkv.shape[2],
        "scale_log2": scale * _LOG2_E,
        "threshold": keep_threshold(dropout_p),
        "keep_scale": 1 / (1 - dropout_p),
        "WINDOW": window,
        **bias_arguments(bias),
        **constants(qkv, dropout_p),
    }


def _of_tiles(window: int | None) -> dict[str, Any]:
    """Return the window of the kernels of short sequences: None where they see all keys anyway."""
    return {"WINDOW": None if window is None or window >= TILE - 1 else window}


def forward(
    qkv: Tensor,
    plan: AttentionPlan,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    window: int | None = None,
    bias: Bias | None = None,
) -> tuple[Tensor, Tensor]:
    """Return O [N, heads, head_dim], and stats, float32 [N, heads, 2] (see long.py, load_stats).

    stats is defined for rows of long sequences only; without any it is [0, heads, 2].
    """
    num_rows, _, num_heads, head_dim = qkv.shape
    out = torch.empty(num_rows, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    stats = torch.empty(num_rows if len(plan.blocks) else 0, num_heads, 2, dtype=torch.float32, device=qkv.device)
    common = _common(qkv, scale, dropout_p, seed, window, bias)
    with torch.cuda.device_of(qkv):
        if len(plan.tile_rows):
            tile_fwd_kernel[(len(plan.tile_rows) * num_heads,)](
                out_ptr=out, rows_ptr=plan.tile_rows, starts_ptr=plan.tile_starts, **common | _of_tiles(window)
            )
        if len(plan.blocks):
            long_fwd_kernel[(len(plan.blocks) * num_heads,)](
                out_ptr=out,
                stats_ptr=stats,
                blocks_ptr=plan.blocks,
                **common | long_fwd_options(qkv, bias=bias is not None),
            )
    return out, stats


def backward(
    qkv: Tensor,
    out: Tensor,
    stats: Tensor,
    dout: Tensor,
    plan: AttentionPlan,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    window: int | None = None,
    bias: Bias | None = None,
    bias_sums: BiasSums | None = None,
) -> Tensor:
    """Return dqkv [N, 3, heads, head_dim]; fill bias_sums, if it is not None."""
    num_rows, num_heads = qkv.shape[0], qkv.shape[2]
    num_tiles, num_blocks = len(plan.tile_rows), len(plan.blocks)
    delta = torch.empty(num_rows if num_blocks else 0, num_heads, dtype=torch.float32, device=qkv.device)
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    common = _common(qkv, scale, dropout_p, seed, window, bias) | {
        "dout_ptr": dout,
        "dqkv_ptr": dqkv,
        "delta_ptr": delta,
        "blocks_ptr": plan.blocks,
        "stride_dout_row": dout.stride(0),
        "stride_dout_head": dout.stride(1),
        "scale": scale,
    }
    with torch.cuda.device_of(qkv):
        if num_tiles or num_blocks:
            options = tile_bwd_options(qkv, bias=bias is not None)
            tile_bwd_kernel[((num_tiles + num_blocks) * num_heads, 3 if options["SPLIT"] else 1)](
                out_ptr=out,
                rows_ptr=plan.tile_rows,
                starts_ptr=plan.tile_starts,
                num_tiles=num_tiles,
                bias_sums_ptr=None if bias_sums is None else bias_sums.of_tiles,
                **common | options | _of_tiles(window),
            )
        if num_blocks:
            options = long_bwd_options(qkv, dropout_p, window, bias=bias is not None)
            long_bwd_kernel[(num_blocks * num_heads, 3 if options["SPLIT"] else 2)](
                stats_ptr=stats,
                bias_sums_ptr=None if bias_sums is None else bias_sums.of_blocks,
                sums_width=None if bias_sums is None else bias_sums.of_blocks.shape[2],
                **common | options,
            )
    return dqkv


class _VarlenAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        bias: Tensor | None,
        plan: AttentionPlan,
        scale: float,
        dropout_p: float,
        seed: Tensor | None,
        window: int | None,
        rotary: Tensor | None,
        group_rows: Tensor | None,
    ) -> Tensor:
        if rotary is not None:
            qkv = rotated(qkv, rotary, plan)
        terms = None if bias is None else Bias(bias, group_rows)
        out, stats = forward(qkv, plan, scale, dropout_p, seed, window, terms)
        # Backward needs `out` for long sequences only; without any, its memory can be freed.
        ctx.save_for_backward(qkv, bias, seed, rotary, group_rows, stats, *([out] if len(stats) else []))
        ctx.plan, ctx.scale, ctx.dropout_p, ctx.window = plan, scale, dropout_p, window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        qkv, table, seed, rotary, group_rows, stats, *kept = ctx.saved_tensors
        dout, plan = _with_unit_stride(dout), ctx.plan
        out = kept[0] if kept else dout
        bias = None if table is None else Bias(table, group_rows)
        sums = BiasSums.empty(bias, plan, qkv.shape[2]) if bias is not None and ctx.needs_input_grad[1] else None
        dqkv = backward(qkv, out, stats, dout, plan, ctx.scale, ctx.dropout_p, seed, ctx.window, bias, sums)
        if rotary is not None:
            rotate_back(dqkv, rotary, plan)
        dbias = None if bias is None or sums is None else bias_gradient(bias, sums, plan)
        return dqkv, dbias, *[None] * 7


def varlen_attention(
    qkv: Tensor,
    plan: AttentionPlan,
    softmax_scale: float,
    dropout_p: float,
    seed: Tensor | None,
    terms: PositionTerms = NO_TERMS,
    group_rows: Tensor | None = None,
) -> Tensor:
    """Return O [N, heads, head_dim] of qkv's dtype.

    group_rows: that of terms.
    """
    seed = seed if dropout_p > 0 else None
    window, rotary, bias, _ = terms
    rotary = None if rotary is None else rotary.contiguous()
    bias = None if bias is None else bias.contiguous()
    window = None if window is None or window >= _WIDEST_WINDOW else window
    return _VarlenAttention.apply(
        _with_unit_stride(qkv), bias, plan, softmax_scale, dropout_p, seed, window, rotary, group_rows
    )


def _with_unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
