"""GeGLU by the C++ kernels of csrc/geglu_cpu.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl_kernels.cast import cast


def forward(x: Tensor, approximate: str) -> Tensor:
    """Return y [N, f] of x's dtype. x: [N, 2 f]; approximate: "none" or "tanh"."""
    y = torch.empty(x.shape[0], x.shape[1] // 2, dtype=x.dtype, device=x.device)
    torch.ops.fastmtl.geglu_out(x.contiguous(), approximate == "tanh", y)
    return y


def backward(dy: Tensor, x: Tensor, approximate: str) -> Tensor:
    """Return dx [N, 2 f] of x's dtype."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.ops.fastmtl.geglu_backward_out(cast(dy, x.dtype).contiguous(), x.contiguous(), approximate == "tanh", dx)
    return dx
