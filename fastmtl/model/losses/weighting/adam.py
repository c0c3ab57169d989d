"""Adam on a few numbers of the host, for weights that are learned beside the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class HostAdam:
    """torch's Adam on one float32 vector on the CPU. values: the vector, which `step` changes."""

    def __init__(self, start: Sequence[float], lr: float, weight_decay: float = 0.0) -> None:
        self.values = torch.tensor(start, dtype=torch.float32)
        self._adam = torch.optim.Adam([self.values], lr=lr, weight_decay=weight_decay)

    def step(self, gradient: Tensor) -> None:
        self.values.grad = gradient.to(self.values)
        self._adam.step()

    def state_dict(self) -> dict[str, Any]:
        moments = {key: value.tolist() for key, value in self._adam.state[self.values].items()}
        return {"values": self.values.tolist(), "moments": moments}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.values.copy_(torch.tensor(state["values"]))
        self._adam.state[self.values] = {key: torch.tensor(value) for key, value in state["moments"].items()}
