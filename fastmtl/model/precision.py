"""The precision in which losses and cosines are computed."""

from __future__ import annotations

from torch import Tensor


def precise(x: Tensor) -> Tensor:
    """Return x in float32, or unchanged if its dtype is at least as wide.

    Cosines need it: in bf16 the rounding error near 1 exceeds most differences between pairs.
    """
    return x if x.dtype.itemsize >= 4 else x.float()
