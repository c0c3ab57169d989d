"""Checks of arguments, shared by several operations.

Each check raises a ValueError that names the wrong argument.
"""

from __future__ import annotations

import torch
from torch import Tensor


def describe(value: object) -> str:
    """Return a text for an error message: a tensor's dtype and shape, or repr(value)."""
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)


def check_dropout(dropout_p: float, seed: Tensor | None, device: torch.device) -> None:
    """Check that dropout_p is in [0, 1), and that the seed is an int64 of one element on `device`.

    The value of the seed is not read, since reading it would wait for a GPU.
    """
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
    """Check that each parameter is floating point [d] on the device of `rows` [N, d].

    parameters: by name, for the message.
    """
    for name, parameter in parameters.items():
        if not isinstance(parameter, Tensor) or parameter.dim() != 1 or not parameter.is_floating_point():
            raise ValueError(f"{name} must be floating point of shape [{rows.shape[1]}], got {describe(parameter)}")
        if parameter.shape[0] != rows.shape[1]:
            raise ValueError(f"{name} must have the shape [{rows.shape[1]}], got {describe(parameter)}")
        if parameter.device != rows.device:
            raise ValueError(f"{name} must be on {rows.device} like the rows, got {parameter.device}")
