"""gradvac_weights: task weights from a Gramian, compared with the paper's loop and TorchJD."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.bench.ops.case import Case, Tensors
from fastmtl.bench.ops.pcgrad_weights import TASKS, case
from fastmtl.bench.sizes import SEED, Size
from fastmtl_kernels import gradvac_weights


def cases(size: Size) -> list[Case]:
    torch.manual_seed(SEED)  # TorchJD draws from the global generator
    order = torch.stack([_projection_order(row) for row in range(TASKS)])
    on_device = order.to(size.device)

    def run(t: Tensors, _: float) -> Tensor:
        return gradvac_weights(t["gram"], torch.zeros_like(t["gram"]), on_device)[0]

    return [case(size, "gradvac_weights", order, run, "GradVacWeighting")]


def _projection_order(row: int) -> Tensor:
    others = torch.tensor([task for task in range(TASKS) if task != row])
    return torch.cat([others[torch.randperm(TASKS - 1)], torch.tensor([row])])
