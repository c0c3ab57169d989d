"""The random order in which PCGrad and GradVac project task gradients, drawn anew for each step."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_order(num_tasks: int, seed: int, step: int) -> Tensor:
    """Return int64 [T, T]: row i is a permutation of the tasks, the order of task i's projections.

    Drawn on the host from (seed, step), so every rank has the same order.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % (1 << 63))
    return torch.stack([torch.randperm(num_tasks, generator=generator) for _ in range(num_tasks)])
