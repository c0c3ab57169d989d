"""Groups of candidates for the losses of rankings, in one process or divided among ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastmtl.config import TaskConfig
from fastmtl.data.packed_batch import Units
from fastmtl.model.examples import Examples
from fastmtl.model.losses.task_loss import build_loss

GRADES = [[1.0, 0.0, 0.0], [0.0, 2.0, 1.0, 0.0, 0.5], [0.0], [0.0, 0.0], [1.0], [3.0, 0.0]]
COUNTS = [len(grades) for grades in GRADES]
SHARES = [[0, 3, 4], [1, 2, 5]]  # groups of each of two ranks


def units_of(counts: Sequence[int]) -> Units:
    offsets = torch.tensor([0, *counts]).cumsum(0)
    example = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts, dtype=torch.int64))
    return Units(example, offsets, None, tuple(offsets.tolist()))


def task(scale: float) -> TaskConfig:
    return TaskConfig.model_validate(
        {
            "type": "ranking",
            "pairs": "bi",
            "loss": "mnr",
            "mnr": {"scale": scale},
            "head": {"name": "cosine"},
            "data": {},
        }
    )


def vectors() -> tuple[Tensor, Tensor]:
    """Return the vectors of queries [groups, 4] and candidates [candidates, 4], float64."""
    draw = torch.Generator().manual_seed(1)
    return tuple(torch.randn(count, 4, dtype=torch.float64, generator=draw) for count in (len(COUNTS), sum(COUNTS)))  # type: ignore[return-value]


def loss(task: TaskConfig, queries: Tensor, candidates: Tensor, groups: Sequence[int]) -> Tensor:
    """Return the summed loss of some groups. queries, candidates: those of all groups."""
    own = [row for group in groups for row in range(sum(COUNTS[:group]), sum(COUNTS[: group + 1]))]
    units = units_of([COUNTS[group] for group in groups])
    u, v = (
        queries[torch.tensor(groups, dtype=torch.int64)][units.example],
        candidates[torch.tensor(own, dtype=torch.int64)],
    )
    grades = torch.tensor([grade for group in groups for grade in GRADES[group]])
    return build_loss(task).of_units(Examples(torch.zeros(len(own), 1), u, v, units), grades, nn.Identity())


def gradients(groups: Sequence[int]) -> dict[str, Tensor]:
    """Return the loss of this rank's groups, and its gradients with respect to all vectors."""
    leaves = [x.requires_grad_() for x in vectors()]
    value = loss(task(5.0), leaves[0], leaves[1], groups)
    queries, candidates = torch.autograd.grad(value, leaves)
    return {"loss": value.detach(), "queries": queries, "candidates": candidates}
