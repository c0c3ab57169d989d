"""PCGrad: projections of conflicting task gradients, in random order."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastmtl.surgery.methods.method import Reduction
from fastmtl_kernels import pcgrad_weights


class PCGrad:
    """PCGrad (Yu et al. 2020, Algorithm 1), computed from the Gramian alone.

    See fastmtl_kernels.pcgrad_weights.
    """

    by_rank = by_tensor = True

    def __init__(self, *, reduction: Reduction = "sum") -> None:
        self._reduction = reduction

    def weights(self, gramian: Tensor, order: Tensor) -> Tensor:
        return pcgrad_weights(gramian, order=order, reduction=self._reduction, check_order=False)

    def of_tensor(self, index: int) -> PCGrad:
        """Return this method itself, which has no state."""
        return self

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
