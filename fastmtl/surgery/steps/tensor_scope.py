"""`scope: tensor`: the T gradients of each parameter are merged in the target's own backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmtl.errors import UserError
from fastmtl.measure.ranges import profile_range
from fastmtl.surgery.info import SurgeryInfo
from fastmtl.surgery.parts import Parts
from fastmtl.surgery.ranks.collectives import sum_over_ranks, world_size
from fastmtl.surgery.sinks.tensor import TensorSink
from fastmtl.surgery.step_losses import LossFunction, Step
from fastmtl.surgery.steps.verified import verify_forward


def tensor_scope(
    parts: Parts,
    sink: TensorSink,
    step: Step,
    micro_batches: Sequence[Any],
    losses_of: LossFunction,
    *,
    by_rank: bool,
) -> SurgeryInfo:
    """Run one optimizer step and return its report.

    by_rank: True if each rank has its own Gramians (`reduce: local`). Raises UserError for a model
    whose modules do not write into the sink.
    """
    if not losses_of.takes_sink:
        raise UserError(
            "scope='tensor' needs one backward pass for all tasks, else the T gradients of a tensor are never there "
            "at once: give the trunk in GradientSurgery(..., model=...), or use scope='global'"
        )
    target = parts.target
    num_tasks = len(parts.tasks)
    total = torch.zeros(num_tasks, num_tasks, device=target.device)
    merged_square = torch.zeros((), device=target.device)

    def solve(index: int, gram: Tensor) -> Tensor:
        weights = parts.solver.weights(gram, index)
        total.add_(gram)
        merged_square.add_(weights @ gram @ weights)
        return weights

    sink.clear()
    sink.solve = solve
    factor = target.loss_scale() * target.factor
    if step.verifies:
        verify_forward(parts, step, micro_batches[0], losses_of)
    with parts.flag_nonfinite_own() as bad_own:
        for number, micro_batch in enumerate(micro_batches, start=1):
            with sink.armed(target.device):
                with profile_range("forward"):
                    losses = losses_of(micro_batch, sink, training_pass=True)
                step.take(losses)
                sink.forward_done()
                with profile_range("backward"):
                    target.backward(step.total(losses), last=number == len(micro_batches))
                sink.check_merged(target.names)
    reported = sum_over_ranks(total) / world_size() if by_rank else total
    host = torch.cat([reported.flatten().double(), merged_square[None].double(), sum_over_ranks(step.sums)]).cpu()
    gram = (host[: num_tasks**2].view(num_tasks, num_tasks) / factor**2).float()
    mean_losses, stop = step.summarize(host[num_tasks**2 + 1 :].tolist())
    for t, name in enumerate(parts.tasks):
        if not torch.isfinite(gram[t, t]):
            if target.backs_off():
                return SurgeryInfo(losses=mean_losses, stop=stop)
            parts.solver.fail("gradient", f"task {name}")
    parts.check_own(bad_own)
    merged = None if by_rank else float(host[num_tasks**2]) / factor**2
    return SurgeryInfo.of_gramian(mean_losses, gram.numpy(), None, merged, nbytes=sink.nbytes(), stop=stop)
