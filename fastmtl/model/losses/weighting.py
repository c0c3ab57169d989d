"""Weights of the tasks' losses that the run finds itself, in place of fixed ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Uncertainty(nn.Module):
    """exp(-s) L + s / 2 for a task's mean loss L, half of exp(-s) L where it is a squared error; s = log sigma^2 is
    learned, from 0 on.

    Source: Kendall, Gal and Cipolla 2018, "Multi-Task Learning Using Uncertainty to Weigh Losses", equations 7 and 10.
    """

    def __init__(self, *, squared_error: bool) -> None:
        super().__init__()
        self.factor = 0.5 if squared_error else 1.0
        # Called a bias so that weight decay leaves it alone: it would pull the weight towards 1.
        self.log_variance_bias = nn.Parameter(torch.zeros(1))

    def forward(self, loss: Tensor, rows: int) -> Tensor:
        """The sum of the losses of some rows -> the sum of their weighted ones, of which only the gradient counts: the
        value stays the plain one, so that what a run tells of its losses can be compared.
        """
        s = self.log_variance_bias.to(loss.dtype).squeeze(0)
        weighted = self.factor * (-s).exp() * loss + 0.5 * rows * s
        return weighted + (loss - weighted).detach()


class DynamicWeightAverage:
    """w_t = T softmax_t(r_t / temperature), r_t = L_t(e - 1) / L_t(e - 2) for the mean losses of the last two epochs.

    1 in the first two epochs, and r_t = 1 for a task without both losses. State for a checkpoint in the middle of an
    epoch is JSON-ready. Source: Liu, Johns and Davison 2019, "End-to-End Multi-Task Learning with Attention", eq. 7.
    """

    def __init__(self, tasks: Sequence[str], temperature: float) -> None:
        self._tasks, self._temperature = list(tasks), temperature
        self._epochs: list[dict[str, float]] = []  # mean losses of the last two epochs, the older one first
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
        """The step's mean loss of each task that had rows."""
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
