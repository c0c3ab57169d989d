"""Loss weights `gradnorm`: learned, so that all tasks train at similar rates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fastmtl.model.losses.weighting.adam import HostAdam
from fastmtl.model.losses.weighting.step_weights import StepWeights
from fastmtl.surgery.info import SurgeryInfo


class GradNorm(StepWeights):
    """Weights w_t whose gradients have norms G_t = w_t |g_t| near mean(G) r_t^alpha.

    r_t = (L_t / L_t(0)) / mean over the tasks of the same, the inverse rate at which task t has
    trained; L_t(0) is its first loss. A step of Adam follows the gradient of
    sum_t |G_t - mean(G) r_t^alpha| with respect to w, with mean(G) r_t^alpha constant; then w is
    scaled to add up to T. A task without rows in a step keeps its weight.
    Source: Chen, Badrinarayanan, Lee and Rabinovich 2018, "GradNorm", algorithm 1. g_t is the
    gradient of all shared parameters, where the paper takes the last shared layer.
    """

    def __init__(self, tasks: Sequence[str], fixed: Sequence[float], alpha: float, lr: float) -> None:
        """Begin with weights of 1. fixed: `tasks.<task>.weight`, which multiply the weights."""
        self._tasks, self._fixed, self._alpha = list(tasks), list(fixed), alpha
        self._adam = HostAdam([1.0] * len(self._tasks), lr)
        self._first: dict[str, float] = {}

    def weights(self) -> dict[str, float]:
        return dict(zip(self._tasks, self._adam.values.tolist(), strict=True))

    def after_step(self, info: SurgeryInfo) -> None:
        if info.skipped is not None or info.task_norms is None:
            return
        here = {name: loss for name, loss in info.losses.items() if math.isfinite(loss) and loss > 0}
        for name, loss in here.items():
            self._first.setdefault(name, loss)
        present = [index for index, name in enumerate(self._tasks) if name in here]
        if len(present) < 2:
            return
        w = self._adam.values
        fixed = torch.tensor(self._fixed)
        norms = (info.task_norms.detach().cpu().float() / fixed)[present]
        rates = torch.tensor([here[self._tasks[index]] / self._first[self._tasks[index]] for index in present])
        target = norms.mean() * (rates / rates.mean()) ** self._alpha
        gradient = torch.zeros_like(w)
        gradient[present] = torch.sign(norms - target) * norms / w[present]
        self._adam.step(gradient)
        w.clamp_(min=1e-3)  # a weight of 0 or less would stop or reverse a task
        w.mul_(len(w) / w.sum())

    def after_epoch(self) -> None:
        """Do nothing: the weights follow the steps."""

    def state_dict(self) -> dict[str, Any]:
        return {"adam": self._adam.state_dict(), "first": self._first}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._adam.load_state_dict(state["adam"])
        self._first = dict(state["first"])
