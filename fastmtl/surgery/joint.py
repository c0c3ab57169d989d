"""`sum`: the plain joint gradient, by the target's own backward or, where its norm is asked for, by autograd."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from fastmtl.ranges import named
from fastmtl.surgery.clipping import clip_factor
from fastmtl.surgery.differentiate import differentiate
from fastmtl.surgery.losses import Losses
from fastmtl.surgery.merged import Merged
from fastmtl.surgery.norms import total_norm
from fastmtl.surgery.parts import Parts
from fastmtl.surgery.reduce import sum_over_ranks
from fastmtl.surgery.step import Step, SurgeryInfo
from fastmtl.surgery.targets import unshared
from fastmtl_kernels.cast import cast


class JointStep:
    """One step: `take` each micro-batch's losses, then `finish`."""

    def __init__(self, parts: Parts, step: Step) -> None:
        self._parts, self._step = parts, step

    def take(self, losses: Losses, *, takes_sink: bool, last: bool) -> None:
        self._step.take(losses)
        with named("backward"):
            self._parts.target.backward(self._step.total(losses), last=last)

    def finish(self) -> SurgeryInfo:
        return _judged(self._parts, self._step, sum_over_ranks(self._step.sums).tolist())


class WatchedJointStep:
    """The same in one process with `max_norm`: the gradient is clipped, and a step skipped where it is not finite,
    before the target has it. The host reads losses and norm at once.
    """

    def __init__(self, parts: Parts, step: Step) -> None:
        self._parts, self._step = parts, step
        self._gradients: list[Tensor | None] = [None] * len(parts.target.parameters)

    def take(self, losses: Losses, *, takes_sink: bool, last: bool) -> None:
        target = self._parts.target
        target.check_forward()
        self._step.take(losses)
        with named("backward"):
            found = differentiate(self._step.terms(losses), target.parameters, target.names)
            for k, gradient in enumerate(found):
                total = self._gradients[k]
                if gradient is not None:  # in float32, for 16 bits would round every sum
                    self._gradients[k] = gradient if total is None else cast(total, torch.float32) + gradient

    def finish(self) -> SurgeryInfo:
        target, max_norm = self._parts.target, self._parts.max_norm
        assert max_norm is not None
        with named("backward"):
            found = dict(zip(target.parameters, self._gradients, strict=True))
            self._gradients = []
            reached = {p: gradient for p, gradient in found.items() if gradient is not None}
            norm = total_norm(list(reached.values()))
            *sums, total = torch.cat([self._step.sums, norm.double()[None]]).tolist()
        info = dataclasses.replace(_judged(self._parts, self._step, sums), total_norm=total)
        if not math.isfinite(total):
            bad = next(target.names[id(p)] for p, gradient in reached.items() if not gradient.isfinite().all())
            self._parts.solver.skip(bad)
            return dataclasses.replace(info, skipped=bad)
        self._parts.solver.good_step()
        with named("backward"):
            clip = clip_factor(total, max_norm)
            gradients = [torch.zeros_like(p) if gradient is None else gradient for p, gradient in found.items()]
            if clip != 1.0:
                gradients = unshared(gradients)
                torch._foreach_mul_(gradients, clip)
            merged, ids = Merged(), {id(p) for p in reached}
            merged.update(zip(map(id, found), gradients, strict=True))
            del found, reached, gradients  # what only `merged` holds becomes `.grad` as it is
            target.hand_over(merged, ids)
        return info


def _judged(parts: Parts, step: Step, sums: list[float]) -> SurgeryInfo:
    losses, stop = step.told(sums)
    for name, loss in losses.items():
        if not math.isfinite(loss) and not parts.target.backs_off():
            parts.solver.stop_at("loss", f"task {name}")
    return SurgeryInfo(losses=losses, stop=stop)
