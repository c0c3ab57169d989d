"""pcgrad_weights: task weights from a Gramian, compared with the paper's loop and TorchJD."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmtl.bench.ops.case import COMPILED, EAGER, Case, Run, Tensors, Way, ours
from fastmtl.bench.sizes import SEED, Size
from fastmtl.measure.harness import Skipped
from fastmtl_kernels import pcgrad_weights

TASKS = 8


def cases(size: Size) -> list[Case]:
    torch.manual_seed(SEED)  # TorchJD draws from the global generator
    order = torch.stack([torch.randperm(TASKS) for _ in range(TASKS)])
    on_device = order.to(size.device)
    return [case(size, "pcgrad_weights", order, lambda t, _: pcgrad_weights(t["gram"], on_device), "PCGradWeighting")]


def case(size: Size, name: str, order: Tensor, run: Run, weighting: str) -> Case:
    """Return the case of an operation that computes task weights from a Gramian.

    order: int64 [T, T]; row i has the order in which task i is projected against the others. run:
    fastmtl's function. weighting: the name of TorchJD's class.
    """
    device = torch.device(size.device)
    rows = torch.randn(TASKS, 2 * TASKS, generator=torch.Generator().manual_seed(SEED))
    return Case(
        name,
        f"{TASKS} tasks",
        {"gram": (rows @ rows.T).to(device)},
        run,
        [
            *ours(device, name, lambda _: run),
            Way(EAGER, lambda: _loop(order)),
            Way(COMPILED, _not_compiled),
            Way("torchjd", lambda: _torchjd(weighting)),
        ],
        {},
    )


def _loop(order: Tensor) -> Run:
    """Return Algorithm 1 of Yu et al. 2020 on a Gramian, as a Python loop over single numbers.

    If all target cosines are 0, GradVac's equation 2 (Wang et al. 2021) gives the same weights.
    """
    projections = order.tolist()

    def run(t: Tensors, _: float) -> Tensor:
        gram, weights = t["gram"], torch.zeros_like(t["gram"][0])
        for i, others in enumerate(projections):
            row = torch.zeros_like(weights)
            row[i] = 1
            for j in others:
                dot = gram[j] @ row
                if j != i and dot < 0:
                    row[j] -= dot / gram[j, j]
            weights += row
        return weights

    return run


def _not_compiled() -> Run:
    raise Skipped("the loop branches on values, so it has no graph")


def _torchjd(name: str) -> Run:
    try:
        from torchjd import aggregation
    except ImportError as error:
        raise Skipped(f"{error}: pip install 'fastmtl-torch[torchjd]'") from None
    found: Any = getattr(aggregation, name, None)
    if found is None:
        raise Skipped(f"this TorchJD has no {name}")
    weighting = found()

    def run(t: Tensors, _: float) -> Tensor:
        torch.manual_seed(SEED)
        if hasattr(weighting, "reset"):
            weighting.reset()  # its target cosines must be those of a first step
        weights: Tensor = weighting(t["gram"])
        return weights

    return run
