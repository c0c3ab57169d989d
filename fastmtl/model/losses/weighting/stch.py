"""Loss weights `stch`: those of a smooth maximum of the losses."""

from __future__ import annotations

from torch import Tensor

from fastmtl.model.losses.weighting.batch_weights import BatchWeights


class SmoothTchebycheff(BatchWeights):
    """The gradient of T^2 mu log sum_t exp(L_t / (T mu)): w = T softmax(L / (T mu)).

    T is the number of tasks with rows. The smaller mu, the more the largest loss counts. T^2 makes
    the weights add up to T, as those of `fixed`.
    Source: Lin et al. 2024, "Smooth Tchebycheff Scalarization for Multi-Objective Optimization",
    with equal preferences and the ideal point 0.
    """

    def __init__(self, mu: float) -> None:
        self._mu = mu

    def weights(self, means: Tensor, present: Tensor) -> Tensor:
        number = present.sum()
        return number * (means / (number * self._mu)).masked_fill(~present, -float("inf")).softmax(0)
