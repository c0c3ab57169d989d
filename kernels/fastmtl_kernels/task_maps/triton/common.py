"""Functions that the Triton kernels of the maps per task share.

They compute activations and the arguments of launches.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmtl_kernels.task_maps.common import Maps, dropout_table


@triton.jit
def activate(x: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    if ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    if ACTIVATION == "relu":
        x = tl.where(x < 0, 0.0, x)
    return x


@triton.jit
def derive(gradient: tl.tensor, x: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """Return the gradient of x, the input of an activation. gradient: that of its output."""
    if ACTIVATION == "gelu":
        gradient *= 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + 0.3989422804014327 * x * tl.exp(-0.5 * x * x)
    if ACTIVATION == "relu":
        gradient = tl.where(x > 0, gradient, 0.0)
    return gradient


def dense(weight: Tensor) -> Tensor:
    """Return the weight [T, a, b] without gaps in memory.

    A copy, unless the weight is contiguous as [T, a, b] or, transposed, as [T, b, a].
    """
    return weight if weight.is_contiguous() or weight.mT.is_contiguous() else weight.contiguous()


def constants(x: Tensor, first: Tensor | None, second: Tensor, dropout: bool) -> dict[str, Any]:
    """Return the constexpr arguments that all kernels share, except the shapes of blocks."""
    rank, d_out = second.shape[1:]
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {
        "D_IN": x.shape[1],
        "RANK": rank,
        "D_OUT": d_out,
        "FIRST_IN": 0 if first is None else first.stride(1),
        "FIRST_RANK": 0 if first is None else first.stride(2),
        "SECOND_RANK": second.stride(1),
        "SECOND_OUT": second.stride(2),
        "HAS_FIRST": first is not None,
        "DROPOUT": dropout,
        # "tf32x3": three TF32 products instead of one give the precision of float32.
        "PRECISION": "tf32x3" if x.dtype == torch.float32 and not allowed else "tf32",
        "BLOCK_R": max(16, triton.next_power_of_2(rank)),
        "enable_fp_fusion": True,
    }


def dropout_pointers(seed: Tensor | None, call: Maps, device: torch.device) -> dict[str, Tensor | None]:
    thresholds, scales = (None, None) if seed is None else dropout_table(call.rates, device)
    return {"seed_ptr": seed, "thresholds_ptr": thresholds, "scales_ptr": scales}
