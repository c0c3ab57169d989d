"""Gradient methods: from a Gramian to the weight of each task's gradient. A new method is one function here and its
name in METHODS.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from fastmtl.errors import unknown_name
from fastmtl_kernels import pcgrad_weights

Reduction = Literal["sum", "mean"]
# (G [T, T] float32, order [T, T] int64, reduction) -> weights [T]
Method = Callable[[Tensor, Tensor, Reduction], Tensor]


def pcgrad(gram: Tensor, order: Tensor, reduction: Reduction) -> Tensor:
    """Yu et al. 2020, Algorithm 1, in coefficients (see fastmtl_kernels.pcgrad_weights)."""
    return pcgrad_weights(gram, order=order, reduction=reduction)


METHODS: dict[str, Method] = {"pcgrad": pcgrad}


def find_method(name: str) -> Method | None:
    """The method of a name, None for `sum`, which needs no Gramian."""
    if name == "sum":
        return None
    if name not in METHODS:
        raise unknown_name("gradient method", name, ["sum", *METHODS])
    return METHODS[name]


def draw_order(num_tasks: int, seed: int, step: int) -> Tensor:
    """A permutation of the tasks for each row, int64 [T, T], the same on every rank: drawn on the host from (seed,
    step).
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % (1 << 63))
    return torch.stack([torch.randperm(num_tasks, generator=generator) for _ in range(num_tasks)])
