"""Loss weights `rlw`: random in every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastmtl.model.losses.weighting.step_weights import StepWeights
from fastmtl.surgery.info import SurgeryInfo


class RandomWeights(StepWeights):
    """w = T softmax(x), with T normal random numbers x per step; T is the number of tasks.

    Source: Lin, Ye, Zhang and Tsang 2022, "Reasonable Effectiveness of Random Weighting", algorithm
    2, with weights that add up to T, as those of `fixed`, not to 1.
    """

    def __init__(self, tasks: Sequence[str], seed: int) -> None:
        self._tasks, self._seed, self._step = list(tasks), seed, 0

    def weights(self) -> dict[str, float]:
        drawn = np.exp(np.random.default_rng([self._seed, self._step, 0, 2]).standard_normal(len(self._tasks)))
        return dict(zip(self._tasks, (len(drawn) * drawn / drawn.sum()).tolist(), strict=True))

    def after_step(self, info: SurgeryInfo) -> None:
        self._step += 1

    def after_epoch(self) -> None:
        """Do nothing: the weights do not depend on the epoch."""

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._step = int(state["step"])
