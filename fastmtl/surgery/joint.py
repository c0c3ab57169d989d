"""`sum`: the plain joint gradient, by the target's own backward."""

from __future__ import annotations

import math

from fastmtl.ranges import named
from fastmtl.surgery.losses import Losses
from fastmtl.surgery.parts import Parts
from fastmtl.surgery.reduce import sum_over_ranks
from fastmtl.surgery.step import Step, SurgeryInfo


class JointStep:
    def __init__(self, parts: Parts, step: Step) -> None:
        self._parts, self._step = parts, step

    def take(self, losses: Losses, *, takes_sink: bool, last: bool) -> None:
        self._step.take(losses)
        with named("backward"):
            self._parts.target.backward(self._step.total(losses), last=last)

    def finish(self) -> SurgeryInfo:
        losses = self._step.mean_losses(sum_over_ranks(self._step.sums).tolist())
        for name, loss in losses.items():
            if not math.isfinite(loss) and not self._parts.target.backs_off():
                self._parts.solver.stop_at("loss", f"task {name}")
        return SurgeryInfo(losses=losses)
