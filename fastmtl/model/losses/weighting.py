"""Weights of the tasks' losses that change during a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Uncertainty(nn.Module):
    """exp(-s) L + s / 2 for a task's mean loss L, or exp(-s) L / 2 + s / 2 for a squared error.

    s = log sigma^2 is learned and starts at 0.
    Source: Kendall, Gal and Cipolla 2018, "Multi-Task Learning Using Uncertainty to Weigh Losses",
    equations 7 and 10.
    """

    def __init__(self, *, squared_error: bool) -> None:
        super().__init__()
        self.factor = 0.5 if squared_error else 1.0
        # The name has "bias" in it to exclude the parameter from weight decay, which would pull the
        # weight towards 1.
        self.log_variance_bias = nn.Parameter(torch.zeros(1))

    def forward(self, loss: Tensor, rows: int) -> Tensor:
        """Map the loss summed over `rows` rows to a loss with the weighted sum's gradient.

        The value stays that of the unweighted loss, so that the losses of runs can be compared.
        """
        s = self.log_variance_bias.to(loss.dtype).squeeze(0)
        weighted = self.factor * (-s).exp() * loss + 0.5 * rows * s
        return weighted + (loss - weighted).detach()


class DynamicWeightAverage:
    """w_t = T softmax_t(r_t / temperature), with r_t = L_t(e - 1) / L_t(e - 2).

    L_t(e) is the mean loss of task t in epoch e. w_t = 1 in the first two epochs, and r_t = 1 for a
    task without both losses. The state for a checkpoint within an epoch can be saved as JSON.
    Source: Liu, Johns and Davison 2019, "End-to-End Multi-Task Learning with Attention", eq. 7.
    """

    def __init__(self, tasks: Sequence[str], temperature: float) -> None:
        self._tasks, self._temperature = list(tasks), temperature
        self._epochs: list[dict[str, float]] = []  # mean losses of the last two epochs, oldest first
        self._sums: dict[str, float] = {}
        self._steps: dict[str, int] = {}

    def weights(self) -> dict[str, float]:
        if len(self._epochs) < 2:
            return dict.fromkeys(self._tasks, 1.0)
        older, newer = self._epochs
        rates = [newer[name] / older[name] if older.get(name) and name in newer else 1.0 for name in self._tasks]
        powers = [math.exp((rate - max(rates)) / self._temperature) for rate in rates]
        return {name: len(powers) * power / sum(powers) for name, power in zip(self._tasks, powers, strict=True)}

    def after_step(self, losses: Mapping[str, float]) -> None:
        """Add a step. losses: the mean loss of each task that had rows."""
        for name, loss in losses.items():
            if math.isfinite(loss):
                self._sums[name] = self._sums.get(name, 0.0) + loss
                self._steps[name] = self._steps.get(name, 0) + 1

    def after_epoch(self) -> None:
        means = {name: total / self._steps[name] for name, total in self._sums.items()}
        self._epochs = [*self._epochs, means][-2:]
        self._sums, self._steps = {}, {}

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self._epochs, "sums": self._sums, "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._epochs, self._sums = list(state["epochs"]), dict(state["sums"])
        self._steps = dict(state["steps"])
