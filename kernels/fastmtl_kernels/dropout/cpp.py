"""Row-wise dropout by the C++ kernel in csrc/add_layer_norm_cpu.cpp.

Other C++ implementations with dropout call this function too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl_kernels.philox import keep_threshold


def dropout(x: Tensor, dropout_p: float, seed: Tensor, out: Tensor | None = None) -> Tensor:
    """Return y [N, d], written into `out` if given; `out` may be x.

    Backward is the same function, applied to dy.
    """
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    threshold, scale = keep_threshold(dropout_p), 1 / (1 - dropout_p)
    torch.ops.fastmtl.row_dropout_out(x.contiguous(), seed, threshold, scale, out)
    return out
