"""Features of an example: u of a single sequence, or combinations of u and v of a pair."""

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
    """Return the number of columns of the result of `features`. hidden_size: d of u and v."""
    return hidden_size * (len(task.head.features) if task.pairs == "bi" else 1)


def features(task: TaskConfig, u: Tensor, v: Tensor | None) -> Tensor:
    """Return the features [E, num_features] of E examples, the input of a linear layer.

    u, v [E, d]: vectors of the first and second sequences; v is None for single sequences. For
    pairs, the combinations in the setting head.features are joined side by side.
    """
    return u if v is None else torch.cat([PAIR_FEATURES[name](u, v) for name in task.head.features], dim=1)
