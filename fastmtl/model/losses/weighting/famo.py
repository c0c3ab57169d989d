"""Loss weights `famo`: learned from how much each loss fell in the last step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmtl.model.losses.weighting.adam import HostAdam
from fastmtl.model.losses.weighting.batch_weights import BatchWeights

EPSILON = 1e-8  # added to the losses


class Famo(BatchWeights):
    """Weights w_t = T z_t / (c L_t), z = softmax(x), with c so that they add up to T.

    They are the gradient of sum_t z_t log L_t, scaled. After each step the losses of its rows are
    computed again, and a step of Adam moves x so that a task whose log-loss fell less gets more
    weight.
    Source: Liu, Feng, Stone and Liu 2023, "FAMO: Fast Adaptive Multitask Optimization", algorithm
    1, with weights that add up to T, as those of `fixed`, not to 1.
    """

    def __init__(self, tasks: Sequence[str], lr: float, weight_decay: float) -> None:
        self._tasks = list(tasks)
        self._adam = HostAdam([0.0] * len(self._tasks), lr, weight_decay)

    def weights(self, means: Tensor, present: Tensor) -> Tensor:
        z = self._adam.values.to(means, non_blocking=True).softmax(0)
        ratio = (z / (means + EPSILON)).masked_fill(~present, 0.0)
        return present.sum() * ratio / ratio.sum()

    def after_step(self, before: Mapping[str, float], after: Mapping[str, float]) -> None:
        """Change the weights after a step.

        before, after: {task: mean loss of the step's rows} before and after the weights of the
        model changed. A task that is missing counts as unchanged.
        """
        old, new = ([losses.get(name, 1.0) for name in self._tasks] for losses in (before, after))
        change = (torch.tensor(old) + EPSILON).log() - (torch.tensor(new) + EPSILON).log()
        if change.isfinite().all():
            z = self._adam.values.softmax(0)
            self._adam.step(z * (change - (z * change).sum()))

    def state_dict(self) -> dict[str, Any]:
        return self._adam.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._adam.load_state_dict(state)
