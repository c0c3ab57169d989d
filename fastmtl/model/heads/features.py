"""Features of an example for a head: u of one sequence, or combinations of u and v of a pair."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.config import TaskConfig

PAIR_FEATURES = {
    "u": lambda u, v: u,
    "v": lambda u, v: v,
    "abs_diff": lambda u, v: (u - v).abs(),
    "product": lambda u, v: u * v,
}


def num_features(task: TaskConfig, hidden_size: int) -> int:
    """Return the width of the result of `features`."""
    return hidden_size * (len(task.head.features) if task.pairs == "bi" else 1)


def features(task: TaskConfig, u: Tensor, v: Tensor | None) -> Tensor:
    """Map u, v [E, d] to [E, num_features]; v is None for examples of one sequence."""
    return u if v is None else torch.cat([PAIR_FEATURES[name](u, v) for name in task.head.features], dim=1)


def precise(x: Tensor) -> Tensor:
    """Return x in float32 at least.

    The rounding of a bf16 cosine near 1 is larger than most differences between pairs.
    """
    return x if x.dtype.itemsize >= 4 else x.float()
