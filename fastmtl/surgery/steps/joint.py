"""`sum`: the joint gradient, by the target's own backward, or by autograd if its norm is needed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from fastmtl.measure.ranges import profile_range
from fastmtl.surgery.clipping import clip_factor_on_device
from fastmtl.surgery.differentiate import differentiate
from fastmtl.surgery.info import SurgeryInfo
from fastmtl.surgery.losses import Losses
from fastmtl.surgery.merged import Merged, by_parameter
from fastmtl.surgery.norms import tensor_norms
from fastmtl.surgery.parts import Parts
from fastmtl.surgery.ranks.collectives import sum_over_ranks
from fastmtl.surgery.sinks.sink import Sink
from fastmtl.surgery.step_losses import LossFunction, Step
from fastmtl_kernels.cast import cast


class JointStep:
    """One optimizer step by the target's own backward. sink: never armed, so layers ignore it.

    own_backward: True if the target's own backward is used, so that the losses come from its model.
    """

    own_backward = True

    def __init__(self, parts: Parts, sink: Sink, step: Step) -> None:
        self._parts, self._sink, self._step = parts, sink, step

    def run(self, micro_batches: Sequence[Any], losses_of: LossFunction) -> SurgeryInfo:
        """Run all micro-batches; the target then has the joint gradient. Return the report."""
        for number, micro_batch in enumerate(micro_batches, start=1):
            with profile_range("forward"):
                losses = losses_of(micro_batch, self._sink, training_pass=self.own_backward)
            self.backward(losses, takes_sink=losses_of.takes_sink, last=number == len(micro_batches))
            # A live autograd graph would bring the default stream into the next CUDA graph.
            del losses
        return self.finish()

    def backward(self, losses: Losses, *, takes_sink: bool, last: bool) -> None:
        """Run backward for one micro-batch."""
        self._step.take(losses)
        self.add(losses, last=last)

    def add(self, losses: Losses, *, last: bool, watch: Callable[[Tensor], None] | None = None) -> None:
        """Add the gradients of a micro-batch, whose losses `step` has taken.

        watch: gets the factor with which backward starts, the loss scale of the target.
        """
        total = self._step.total(losses)
        if watch is not None:
            total.register_hook(watch)
        with profile_range("backward"):
            self._parts.target.backward(total, last=last)

    def finish(self) -> SurgeryInfo:
        """Return the report of the step."""
        return _report(self._parts, self._step, sum_over_ranks(self._step.sums).tolist())


class ClippedJointStep(JointStep):
    """One step with `max_norm`, skipped if the gradient is not finite.

    Needs a single process, or a target that sums gradients over ranks before `hand_over`.

    The host waits for the device once, to read losses and norms. If the target can discard a step,
    the gradient is handed over before, so that a GPU has work during the wait.
    """

    own_backward = False

    def __init__(self, parts: Parts, sink: Sink, step: Step) -> None:
        super().__init__(parts, sink, step)
        self._gradients: list[Tensor | None] = [None] * len(parts.target.parameters)

    def add(self, losses: Losses, *, last: bool, watch: Callable[[Tensor], None] | None = None) -> None:
        """Compute one micro-batch's gradients and add them to those before, in float32."""
        target = self._parts.target
        target.check_forward()
        if watch is not None:
            watch(torch.ones((), device=target.device))
        with profile_range("backward"):
            found = differentiate(self._step.terms(losses), target.parameters, target.names)
            for k, gradient in enumerate(found):
                total = self._gradients[k]
                if gradient is not None:  # float32, since 16 bits would round every sum
                    self._gradients[k] = gradient if total is None else cast(total, torch.float32) + gradient

    def finish(self) -> SurgeryInfo:
        parts, target, max_norm = self._parts, self._parts.target, self._parts.max_norm
        assert max_norm is not None
        merged, reached = self._summed(exclusive=target.sums_ranks or math.isfinite(max_norm))
        ids = [id(parameter) for parameter in target.parameters if id(parameter) in reached]
        with profile_range("backward"):
            norms = tensor_norms([merged[key] for key in ids])
            total = torch.linalg.vector_norm(norms)
            if math.isfinite(max_norm):
                torch._foreach_mul_(list(merged.values()), clip_factor_on_device(total, max_norm))
            if target.can_discard:
                target.hand_over(merged, ids)
            numbers = torch.cat([sum_over_ranks(self._step.sums), total[None], norms]).tolist()
        sums, norm, norms_by_id = numbers[: len(parts.tasks) + 1], numbers[len(parts.tasks) + 1], numbers[-len(ids) :]
        info = dataclasses.replace(_report(parts, self._step, sums), total_norm=norm)
        if not math.isfinite(norm):
            if target.can_discard:
                target.discard()
            bad = next(
                target.names[key] for key, found in zip(ids, norms_by_id, strict=True) if not math.isfinite(found)
            )
            parts.solver.skip(bad)
            return dataclasses.replace(info, skipped=bad)
        parts.solver.count_finite_step()
        if not target.can_discard:
            target.hand_over(merged, ids)
        return info

    def _summed(self, *, exclusive: bool) -> tuple[Merged, Collection[int]]:
        """Return the gradients of all parameters, and ids of those that a loss has reached.

        Both are over all ranks. This step drops its own references to the gradients, so they become
        `.grad` without a copy. exclusive: True if they are changed in place.
        """
        target = self._parts.target
        found, self._gradients = self._gradients, []
        merged, reached = by_parameter(target.parameters, found, exclusive=exclusive)
        del found
        with profile_range("communication") if target.sums_ranks else nullcontext():
            return merged, target.sum_over_ranks(merged, reached)


def _report(parts: Parts, step: Step, sums: list[float]) -> SurgeryInfo:
    losses, stop = step.summarize(sums)
    for name, loss in losses.items():
        if not math.isfinite(loss) and not parts.target.backs_off():
            parts.solver.fail("loss", f"task {name}")
    return SurgeryInfo(losses=losses, stop=stop)
