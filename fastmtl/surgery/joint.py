"""`sum`: the plain joint gradient, by the target's own backward or, where its norm is asked for, by autograd."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from fastmtl.measure.ranges import profile_range
from fastmtl.surgery.clipping import clip_factor_on_device
from fastmtl.surgery.differentiate import differentiate
from fastmtl.surgery.losses import Losses
from fastmtl.surgery.merged import Merged
from fastmtl.surgery.norms import tensor_norms
from fastmtl.surgery.parts import Parts
from fastmtl.surgery.ranks.reduce import sum_over_ranks
from fastmtl.surgery.step import Step, SurgeryInfo
from fastmtl.surgery.targets.target import unshared
from fastmtl_kernels.cast import cast


class JointStep:
    """One step: `take` each micro-batch's losses, then `finish`."""

    def __init__(self, parts: Parts, step: Step) -> None:
        self._parts, self._step = parts, step

    def take(self, losses: Losses, *, takes_sink: bool, last: bool) -> None:
        self._step.take(losses)
        with profile_range("backward"):
            self._parts.target.backward(self._step.total(losses), last=last)

    def finish(self) -> SurgeryInfo:
        return _judged(self._parts, self._step, sum_over_ranks(self._step.sums).tolist())


class WatchedJointStep:
    """One step in one process with `max_norm`: the gradient is clipped, and the step skipped where it is not finite.

    The host reads losses and norms at once, and where the target can take a step back only after it has handed the
    gradient over: a GPU computes meanwhile.
    """

    def __init__(self, parts: Parts, step: Step) -> None:
        self._parts, self._step = parts, step
        self._gradients: list[Tensor | None] = [None] * len(parts.target.parameters)

    def take(self, losses: Losses, *, takes_sink: bool, last: bool) -> None:
        target = self._parts.target
        target.check_forward()
        self._step.take(losses)
        with profile_range("backward"):
            found = differentiate(self._step.terms(losses), target.parameters, target.names)
            for k, gradient in enumerate(found):
                total = self._gradients[k]
                if gradient is not None:  # in float32, for 16 bits would round every sum
                    self._gradients[k] = gradient if total is None else cast(total, torch.float32) + gradient

    def finish(self) -> SurgeryInfo:
        parts, target = self._parts, self._parts.target
        ids = [id(p) for p, gradient in zip(target.parameters, self._gradients, strict=True) if gradient is not None]
        with profile_range("backward"):
            norms = tensor_norms([gradient for gradient in self._gradients if gradient is not None])
            total = torch.linalg.vector_norm(norms)
            merged = self._clipped(total)
            if target.takes_back:
                target.hand_over(merged, ids)
            numbers = torch.cat([self._step.sums, total[None], norms]).tolist()
        sums, norm, each = numbers[: len(parts.tasks) + 1], numbers[len(parts.tasks) + 1], numbers[-len(ids) :]
        info = dataclasses.replace(_judged(parts, self._step, sums), total_norm=norm)
        if not math.isfinite(norm):
            if target.takes_back:
                target.take_back()
            bad = next(target.names[key] for key, found in zip(ids, each, strict=True) if not math.isfinite(found))
            parts.solver.skip(bad)
            return dataclasses.replace(info, skipped=bad)
        parts.solver.good_step()
        if not target.takes_back:
            target.hand_over(merged, ids)
        return info

    def _clipped(self, total: Tensor) -> Merged:
        """Return gradients of all parameters, which nobody else holds then, so that they become `.grad` as they are."""
        max_norm, parameters = self._parts.max_norm, self._parts.target.parameters
        assert max_norm is not None
        found, self._gradients = self._gradients, []
        gradients = [
            torch.zeros_like(p) if gradient is None else gradient for p, gradient in zip(parameters, found, strict=True)
        ]
        if math.isfinite(max_norm):
            gradients = unshared(gradients)
            torch._foreach_mul_(gradients, clip_factor_on_device(total, max_norm))
        merged = Merged()
        merged.update(zip(map(id, parameters), gradients, strict=True))
        return merged


def _judged(parts: Parts, step: Step, sums: list[float]) -> SurgeryInfo:
    losses, stop = step.summarize(sums)
    for name, loss in losses.items():
        if not math.isfinite(loss) and not parts.target.backs_off():
            parts.solver.stop_at("loss", f"task {name}")
    return SurgeryInfo(losses=losses, stop=stop)
