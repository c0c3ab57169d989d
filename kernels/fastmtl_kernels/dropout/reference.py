"""Reference of row-wise dropout in plain torch: it defines the result and runs on any device.

    y = keep x / (1 - dropout_p)

x, y [N, d], any floating dtype. keep is the result of fastmtl_kernels.philox.keep_mask.
Gradients by autograd. Source: Srivastava et al., Dropout, 2014.
"""

from __future__ import annotations

from torch import Tensor

from fastmtl_kernels.philox import keep_mask


def dropout(x: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """Return y [N, d] in x's dtype; x itself if there is no seed or dropout_p is 0."""
    if seed is None or dropout_p == 0:
        return x
    keep = keep_mask(seed, x.shape[0], x.shape[1], dropout_p)
    return (x * (1 / (1 - dropout_p))).masked_fill(~keep, 0.0)
