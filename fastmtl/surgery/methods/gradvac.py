"""GradVac: target cosines from a moving average."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmtl.errors import UserError, quoted
from fastmtl.surgery.methods.method import Reduction
from fastmtl_kernels import gradvac_weights


class GradVac:
    """GradVac (Wang et al. 2021, Algorithm 1), computed from the Gramian alone.

    See fastmtl_kernels.gradvac_weights. Target cosines are a moving average of the observed ones,
    starting at 0. beta: weight of the newest cosine in the average.
    """

    by_rank, by_tensor = False, True

    def __init__(self, *, reduction: Reduction = "sum", beta: float = 0.01) -> None:
        if isinstance(beta, bool) or not isinstance(beta, int | float) or not 0 <= beta <= 1:
            raise UserError(f"gradient method gradvac: the option beta is {quoted(beta)}: give a number from 0 to 1")
        self._reduction, self._beta = reduction, beta
        self._key = "all"
        self._targets: dict[str, Tensor] = {}

    def weights(self, gramian: Tensor, order: Tensor) -> Tensor:
        key = self._key
        if key not in self._targets:
            self._targets[key] = torch.zeros_like(gramian)
        elif self._targets[key].device != gramian.device:
            self._targets[key] = self._targets[key].to(gramian.device)
        target = self._targets[key]
        weights, cosines = gradvac_weights(gramian, target, order=order, reduction=self._reduction, check_order=False)
        # In place, here and in `load_state_dict`, since a CUDA graph holds the address.
        target.copy_(torch.where(gramian.isfinite().all(), target.lerp(cosines, self._beta), target))
        return weights

    def of_tensor(self, index: int) -> GradVac:
        """Return a GradVac for one parameter tensor; its averages belong to this method's state."""
        view = GradVac(reduction=self._reduction, beta=self._beta)
        view._key, view._targets = str(index), self._targets
        return view

    def state_dict(self) -> dict[str, Any]:
        return {"targets": {key: target.tolist() for key, target in self._targets.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        given = {key: torch.tensor(rows, dtype=torch.float32) for key, rows in state["targets"].items()}
        for key, target in self._targets.items():
            target.copy_(given.pop(key, torch.zeros(())))
        self._targets.update(given)
