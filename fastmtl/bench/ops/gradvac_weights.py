"""gradvac_weights: from a Gramian to the tasks' weights in a first step, beside the paper's loop and TorchJD's."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.bench.ops.case import Case, Tensors
from fastmtl.bench.ops.pcgrad_weights import TASKS, case
from fastmtl.bench.sizes import SEED, Size
from fastmtl_kernels import gradvac_weights


def cases(size: Size) -> list[Case]:
    torch.manual_seed(SEED)  # as TorchJD draws, from the global generator
    order = torch.stack([_meets(row) for row in range(TASKS)])
    there = order.to(size.device)

    def run(t: Tensors, _: float) -> Tensor:
        return gradvac_weights(t["gram"], torch.zeros_like(t["gram"]), there)[0]

    return [case(size, "gradvac_weights", order, run, "GradVacWeighting")]


def _meets(row: int) -> Tensor:
    others = torch.tensor([task for task in range(TASKS) if task != row])
    return torch.cat([others[torch.randperm(TASKS - 1)], torch.tensor([row])])
