"""Reference of GeGLU in plain torch: it defines the result and runs on any device.

    y = gelu(a) b, where a and b are the halves of x

x [..., 2 f], y [..., f], any floating dtype; arithmetic in float32, in float64 where x is float64.
Gradients by autograd. Source: see fastmtl_kernels.geglu.api.
"""

from __future__ import annotations

import torch
from torch import Tensor


def geglu(x: Tensor, approximate: str) -> Tensor:
    """Return y [..., f] in x's dtype. approximate: "none" or "tanh"."""
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
    return (torch.nn.functional.gelu(a, approximate=approximate) * b).to(x.dtype)
