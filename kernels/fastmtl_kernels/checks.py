"""Checks of arguments that several operations share.

Each raises a ValueError that names the wrong argument.
"""

from __future__ import annotations

import torch
from torch import Tensor


def describe(value: object) -> str:
    """Return a tensor's dtype and shape for a message; anything else as it prints."""
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)


def check_dropout(dropout_p: float, seed: Tensor | None, device: torch.device) -> None:
    """Check a probability and its seed; values on a device are not read."""
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if seed is None:
        if dropout_p > 0:
            raise ValueError("seed must be an int64 tensor of one element where dropout_p > 0, got None")
        return
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(f"seed must be an int64 tensor of one element, got {describe(seed)}")
    if seed.device != device:
        raise ValueError(f"seed must be on {device} like the rows, got {seed.device}")


def check_columns(rows: Tensor, parameters: dict[str, Tensor]) -> None:
    """Check that parameters, by name, are floating point [d] on the device of rows [N, d]."""
    for name, parameter in parameters.items():
        if not isinstance(parameter, Tensor) or parameter.dim() != 1 or not parameter.is_floating_point():
            raise ValueError(f"{name} must be floating point of shape [{rows.shape[1]}], got {describe(parameter)}")
        if parameter.shape[0] != rows.shape[1]:
            raise ValueError(f"{name} must have the shape [{rows.shape[1]}], got {describe(parameter)}")
        if parameter.device != rows.device:
            raise ValueError(f"{name} must be on {rows.device} like the rows, got {parameter.device}")
