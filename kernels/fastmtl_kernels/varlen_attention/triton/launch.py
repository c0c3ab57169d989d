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

- Sequences of at most 64 tokens (short.py): a program processes a tile of 64 rows, of one or more
  sequences. It has whole rows of P, so rowsum(P dP) stays in its registers.
- Longer sequences (long.py): a program loops over the 64-row blocks of its sequence. Forward keeps
  the maximum and the sum of each row. A program of backward computes dK and dV of a block of keys,
  or dQ of a block of queries. It reads rowsum(P dP) = rowsum(O dO), which the launch of
  tile_bwd_kernel stores.

The two kinds have separate launches: in a common launch, a tile would occupy as many registers and
as much shared memory as a long sequence.

Limits: a value that is not finite makes its whole tile not finite, including other sequences of the
tile. float32 spills registers: it is for checks, not for speed. Not differentiable twice.
Source: Dao, FlashAttention-2, 2023; for dropout see fastmtl_kernels.varlen_attention.reference.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastmtl_kernels.philox import keep_threshold
from fastmtl_kernels.varlen_attention.plan import AttentionPlan
from fastmtl_kernels.varlen_attention.triton.long import long_bwd_kernel, long_fwd_kernel
from fastmtl_kernels.varlen_attention.triton.short import tile_bwd_kernel, tile_fwd_kernel

_LOG2_E = 1.4426950408889634


def _constants(qkv: Tensor, dropout_p: float) -> dict[str, Any]:
    """Return the constexpr arguments and launch options that all kernels share."""
    head_dim = qkv.shape[3]
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "DROPOUT": dropout_p > 0,
        # "tf32x3": three TF32 products instead of one give the precision of float32.
        "PRECISION": "tf32x3" if qkv.dtype == torch.float32 else "tf32",
        "num_warps": 4,
        "num_stages": 2,
    }


def _tile_bwd_options(qkv: Tensor) -> dict[str, Any]:
    """Return options that keep tile_bwd_kernel within the registers of sm_90.

    SPLIT: a program computes only one of dQ, dK and dV, if all three do not fit in registers.
    """
    head_dim = qkv.shape[3]
    split = qkv.dtype == torch.float32 and head_dim > 16 and head_dim != 32
    return {"SPLIT": split, "num_warps": 8 if split or head_dim > 64 else 4}


def _long_fwd_options(qkv: Tensor) -> dict[str, Any]:
    """Return options that keep long_fwd_kernel within the registers of sm_90.

    Heads that cannot be loaded with vector instructions need more warps.
    """
    wide = qkv.dtype == torch.float32 and 16 < qkv.shape[3] < 32
    return ({"num_warps": 8, "num_stages": 1} if wide else {}) | _register_bound(qkv)


def _long_bwd_options(qkv: Tensor, dropout_p: float) -> dict[str, Any]:
    """Return options that keep long_bwd_kernel within the registers of sm_90.

    Heads that cannot be loaded with vector instructions need a register per address, so they get
    more warps and the next block is not loaded ahead. Nor is it for heads of 64 columns without
    dropout, as the compiler then keeps more of that block in registers. SPLIT: a program computes
    only one of dK and dV, if both do not fit in registers.
    """
    head_dim, is_float = qkv.shape[3], qkv.dtype == torch.float32
    vectors = head_dim in (16, 32, 64) and not is_float
    ahead = vectors and (dropout_p > 0 or head_dim < 64)
    num_warps = 4 if vectors or is_float else 8
    options = {"SPLIT": head_dim > 64 or is_float, "num_warps": num_warps, "num_stages": 2 if ahead else 1}
    return options | _register_bound(qkv)


def _register_bound(qkv: Tensor) -> dict[str, Any]:
    """Return a register bound for float32 with wide heads on GPUs before sm_90, else no options.

    Without a bound, the assembler for these GPUs falls back to code that spills more registers. For
    sm_90 it does not, and a bound would spill a few bytes. The interpreter has no target GPU.
    """
    if qkv.dtype != torch.float32 or qkv.shape[3] <= 32 or triton.knobs.runtime.interpret:
        return {}
    return {"maxnreg": 255} if triton.runtime.driver.active.get_current_target().arch < 90 else {}


def _common(qkv: Tensor, scale: float, dropout_p: float, seed: Tensor | None) -> dict[str, Any]:
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
        **_constants(qkv, dropout_p),
    }


def forward(
    qkv: Tensor, plan: AttentionPlan, scale: float, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return O [N, heads, head_dim], and stats, float32 [N, heads, 2] (see long.py, _load_stats).

    stats is defined for rows of long sequences only; without any it is [0, heads, 2].
    """
    num_rows, _, num_heads, head_dim = qkv.shape
    out = torch.empty(num_rows, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    stats = torch.empty(num_rows if len(plan.blocks) else 0, num_heads, 2, dtype=torch.float32, device=qkv.device)
    common = _common(qkv, scale, dropout_p, seed)
    with torch.cuda.device_of(qkv):
        if len(plan.tile_rows):
            tile_fwd_kernel[(len(plan.tile_rows) * num_heads,)](
                out_ptr=out, rows_ptr=plan.tile_rows, starts_ptr=plan.tile_starts, **common
            )
        if len(plan.blocks):
            long_fwd_kernel[(len(plan.blocks) * num_heads,)](
                out_ptr=out, stats_ptr=stats, blocks_ptr=plan.blocks, **common | _long_fwd_options(qkv)
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
) -> Tensor:
    """Return dqkv [N, 3, heads, head_dim]."""
    num_rows, num_heads = qkv.shape[0], qkv.shape[2]
    num_tiles, num_blocks = len(plan.tile_rows), len(plan.blocks)
    delta = torch.empty(num_rows if num_blocks else 0, num_heads, dtype=torch.float32, device=qkv.device)
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    common = _common(qkv, scale, dropout_p, seed) | {
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
            options = _tile_bwd_options(qkv)
            tile_bwd_kernel[((num_tiles + num_blocks) * num_heads, 3 if options["SPLIT"] else 1)](
                out_ptr=out,
                rows_ptr=plan.tile_rows,
                starts_ptr=plan.tile_starts,
                num_tiles=num_tiles,
                **common | options,
            )
        if num_blocks:
            options = _long_bwd_options(qkv, dropout_p)
            long_bwd_kernel[(num_blocks * num_heads, 3 if options["SPLIT"] else 2)](stats_ptr=stats, **common | options)
    return dqkv


class _VarlenAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, plan: AttentionPlan, scale: float, dropout_p: float, seed: Tensor | None
    ) -> Tensor:
        out, stats = forward(qkv, plan, scale, dropout_p, seed)
        # Backward needs `out` for long sequences only; without any, its memory can be freed.
        ctx.save_for_backward(qkv, seed, stats, *([out] if len(stats) else []))
        ctx.plan, ctx.scale, ctx.dropout_p = plan, scale, dropout_p
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None, None, None]:
        qkv, seed, stats, *kept = ctx.saved_tensors
        dout = _with_unit_stride(dout)
        out = kept[0] if kept else dout
        return backward(qkv, out, stats, dout, ctx.plan, ctx.scale, ctx.dropout_p, seed), None, None, None, None


def varlen_attention(
    qkv: Tensor, plan: AttentionPlan, softmax_scale: float, dropout_p: float, seed: Tensor | None
) -> Tensor:
    """Return O [N, heads, head_dim] of qkv's dtype."""
    seed = seed if dropout_p > 0 else None
    return _VarlenAttention.apply(_with_unit_stride(qkv), plan, softmax_scale, dropout_p, seed)


def _with_unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
