"""Equal weights: the sum of all task gradients, as of joint training, with its measurements."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Equal:
    """Weights of 1. The merged gradient is that of `sum`, up to the rounding of its additions."""

    by_rank = by_tensor = True

    def weights(self, gramian: Tensor, order: Tensor) -> Tensor:
        return gramian.new_ones(len(gramian))

    def of_tensor(self, index: int) -> Equal:
        """Return this method itself, which has no state."""
        return self

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
