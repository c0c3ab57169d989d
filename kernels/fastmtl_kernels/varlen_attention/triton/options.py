"""Constants and launch options of the kernels of varlen_attention.

They keep the kernels within the registers of sm_90. docs/compile-table.md lists the results.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor


def constants(qkv: Tensor, dropout_p: float) -> dict[str, Any]:
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


def tile_bwd_options(qkv: Tensor, *, bias: bool) -> dict[str, Any]:
    """Return options that keep tile_bwd_kernel within the registers of sm_90.

    SPLIT: a program computes only one of dQ, dK and dV, if all three do not fit in registers.
    bias: whether the scores have one.
    """
    head_dim = qkv.shape[3]
    split = qkv.dtype == torch.float32 and head_dim > 16 and head_dim != 32
    options = {"SPLIT": split, "num_warps": 8 if split or head_dim > 64 else 4}
    return options | (_register_bound(qkv) if bias else {})


def long_fwd_options(qkv: Tensor, *, bias: bool) -> dict[str, Any]:
    """Return options that keep long_fwd_kernel within the registers of sm_90.

    Heads that cannot be loaded with vector instructions need more warps. With a bias, nothing is
    loaded ahead: the places of 64 x 64 numbers of the bias would take the registers.
    """
    wide = qkv.dtype == torch.float32 and 16 < qkv.shape[3] < 32
    options = {"num_warps": 8, "num_stages": 1} if wide else {"num_stages": 1} if bias else {}
    return options | _register_bound(qkv)


def long_bwd_options(qkv: Tensor, dropout_p: float, window: int | None, *, bias: bool) -> dict[str, Any]:
    """Return options that keep long_bwd_kernel within the registers of sm_90.

    Heads that cannot be loaded with vector instructions need a register per address, so they get
    more warps and the next block is not loaded ahead. Nor is it for heads of 64 columns without
    dropout, as the compiler then keeps more of that block in registers, or with a window, whose
    mask takes the registers. A bias needs more warps too. SPLIT: a program computes only one of dK
    and dV, if both do not fit in registers.
    """
    head_dim, is_float = qkv.shape[3], qkv.dtype == torch.float32
    vectors = head_dim in (16, 32, 64) and not is_float
    ahead = vectors and (dropout_p > 0 and window is None or head_dim < 64) and not bias
    num_warps = 4 if (vectors or is_float) and not bias else 8
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
