"""A tensor in another dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), and x itself where it has it: `to` is a call of an operator even then, of several in each layer."""
    return x if x.dtype == dtype else x.to(dtype)
