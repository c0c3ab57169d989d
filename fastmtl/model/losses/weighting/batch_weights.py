"""Loss weights that depend on the losses of the micro-batch itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastmtl.surgery.ranks.collectives import sum_over_ranks, world_size
from fastmtl_kernels.upload import upload


class BatchWeights(Protocol):
    """Weights of the losses of a micro-batch, as a function of these losses."""

    def weights(self, means: Tensor, present: Tensor) -> Tensor:
        """Return the weights [T], which add up to the number of tasks with rows.

        means: [T], the tasks' mean losses in the micro-batch over all ranks; 0 for a task without
        rows. present: bool [T], the tasks with rows.
        """
        ...


def weighted(losses: Sequence[Tensor], terms: Sequence[int], by: BatchWeights) -> list[Tensor]:
    """Return losses with the gradients of the weighted losses and the values of the unweighted.

    losses: T 0-dim sums over `terms` loss terms. With several ranks, every rank calls this function
    for its part of the micro-batch, and the weights are those of the whole one.
    """
    sums = torch.stack([loss.detach() for loss in losses]).double()
    counts = upload(torch.tensor(terms, dtype=sums.dtype), sums.device)
    if world_size() > 1:
        sums, counts = sum_over_ranks(torch.stack([sums, counts])).unbind()
    present = counts > 0
    weights = by.weights(sums / counts.clamp(min=1), present).to(losses[0].dtype).unbind()
    scaled = [weight * loss for weight, loss in zip(weights, losses, strict=True)]
    return [new + (loss - new).detach() for new, loss in zip(scaled, losses, strict=True)]
