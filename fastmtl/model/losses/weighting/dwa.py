"""Loss weights `dwa`: dynamic weight average, by how fast the losses fell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastmtl.model.losses.weighting.step_weights import StepWeights
from fastmtl.surgery.info import SurgeryInfo


class DynamicWeightAverage(StepWeights):
    """Task weights for each epoch e, larger for a task whose loss falls more slowly.

    w_t = T softmax_t(r_t / temperature), with r_t = L_t(e - 1) / L_t(e - 2). L_t(e) is the mean
    loss of task t in epoch e. In the first two epochs w_t = 1. If one of the two losses is missing,
    r_t = 1. `state_dict` can be saved as JSON at any step.
    Source: Liu, Johns and Davison 2019, "End-to-End Multi-Task Learning with Attention", eq. 7.
    """

    def __init__(self, tasks: Sequence[str], temperature: float) -> None:
        self._tasks, self._temperature = list(tasks), temperature
        self._epochs: list[dict[str, float]] = []  # mean losses of the last two epochs, oldest first
        self._sums: dict[str, float] = {}
        self._steps: dict[str, int] = {}

    def weights(self) -> dict[str, float]:
        """Return {task: weight w_t of its loss in the current epoch}."""
        if len(self._epochs) < 2:
            return dict.fromkeys(self._tasks, 1.0)
        older, newer = self._epochs
        rates = [newer[name] / older[name] if older.get(name) and name in newer else 1.0 for name in self._tasks]
        powers = [math.exp((rate - max(rates)) / self._temperature) for rate in rates]
        return {name: len(powers) * power / sum(powers) for name, power in zip(self._tasks, powers, strict=True)}

    def after_step(self, info: SurgeryInfo) -> None:
        """Record the mean losses of a step; NaN and inf are ignored."""
        for name, loss in info.losses.items():
            if math.isfinite(loss):
                self._sums[name] = self._sums.get(name, 0.0) + loss
                self._steps[name] = self._steps.get(name, 0) + 1

    def after_epoch(self) -> None:
        """Take over the mean losses of the epoch that has ended."""
        means = {name: total / self._steps[name] for name, total in self._sums.items()}
        self._epochs = [*self._epochs, means][-2:]
        self._sums, self._steps = {}, {}

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self._epochs, "sums": self._sums, "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._epochs, self._sums = list(state["epochs"]), dict(state["sums"])
        self._steps = dict(state["steps"])
