"""Conversion of a tensor to another dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x.to(dtype); x itself, without the cost of a call, if it has the dtype already."""
    return x if x.dtype == dtype else x.to(dtype)
