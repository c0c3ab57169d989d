"""The setting mnr.cached: a loss over the pairs of a whole step, in the memory of a micro-batch.

A first pass without autograd computes u and v of every micro-batch of an optimiser step. The loss
of all their pairs together gives its gradients du and dv with respect to u and v. In the step
itself the loss of a micro-batch is u . du + v . dv, which has the same gradient with respect to the
weights.
Source: Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"
(GradCache).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmtl.data.packed_batch import PackedBatch
from fastmtl.model.multitask import MultiTaskModel
from fastmtl.model.precision import precise
from fastmtl.surgery.random_state import RandomState


@dataclass(frozen=True)
class CachedTask:
    """Results of the first pass for one task's examples in one micro-batch.

    du, dv: [E, d], gradients of the step's summed loss with respect to u and v.
    losses: [E], the examples' losses.
    """

    du: Tensor
    dv: Tensor
    losses: Tensor

    def of_pairs(self, u: Tensor, v: Tensor) -> Tensor:
        """Return the cached losses [E]. Their backward gives u and v the gradients du and dv.

        u, v: [E, d], computed again with autograd.
        """
        linear = (precise(u) * self.du).sum(1) + (precise(v) * self.dv).sum(1)
        return linear + (self.losses - linear).detach()


@dataclass(frozen=True)
class CachedPairs:
    """Results of the first pass for one micro-batch.

    random: the random state before the first pass; restored before the second one, which needs the
    same dropout masks. tasks: {index of the task: its results}.
    """

    random: RandomState
    tasks: dict[int, CachedTask]


def cache_pairs(model: MultiTaskModel, micro_batches: Sequence[PackedBatch]) -> list[PackedBatch]:
    """Run the first pass over the micro-batches of a step; return them with `cached` set.

    They are returned unchanged if no task has the loss mnr with `mnr.cached`. Otherwise every rank
    has to call this function, because the loss gathers the pairs of all ranks.
    """
    indices = [
        index for index, task in enumerate(model.recipe.tasks.values()) if task.mnr.cached and "mnr" in task.losses
    ]
    if not indices:
        return list(micro_batches)
    states, vectors = [], []
    for batch in micro_batches:
        states.append(RandomState.capture(batch.input_ids.device))
        with torch.no_grad():
            vectors.append(model.examples(batch))
    tasks: list[dict[int, CachedTask]] = [{} for _ in micro_batches]
    for index in indices:
        counts = [batch.counts[index] for batch in micro_batches]
        u, v = (precise(torch.cat([getattr(found[index], name) for found in vectors])) for name in ("u", "v"))
        labels = [batch.labels[index] for batch in micro_batches]
        known_labels = torch.cat([u.new_zeros(0), *(x for x in labels if x is not None)])
        losses = model.losses[index].of_pairs(u.requires_grad_(), v.requires_grad_(), known_labels)
        gradients = torch.autograd.grad(losses.sum(), (u, v))
        pieces = zip(*(x.split(counts) for x in (*gradients, losses.detach())), strict=True)
        for known, piece in zip(tasks, pieces, strict=True):
            known[index] = CachedTask(*piece)
    cached = [CachedPairs(state, known) for state, known in zip(states, tasks, strict=True)]
    return [dataclasses.replace(batch, cached=known) for batch, known in zip(micro_batches, cached, strict=True)]
