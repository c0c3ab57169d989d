"""Moving average of the trained weights, for evaluation and the saved model (`train.ema`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """The average decay * average + (1 - decay) * weight of each trained weight, in float32.

    The average begins with the weights before the first step.
    model: its parameters stay the same objects during the run.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model, self._decay = model, decay
        self._averages = {
            name: weight.detach().to(torch.float32, copy=True)
            for name, weight in model.named_parameters()
            if weight.requires_grad
        }

    def update(self) -> None:
        """Take the weights after an optimiser step into the averages."""
        weights = self._model.state_dict(keep_vars=True)
        with torch.no_grad():
            for name, average in self._averages.items():
                self._averages[name] = average.to(weights[name].device).lerp_(weights[name].float(), 1 - self._decay)

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Give the model the averages for the time of the block, in the dtype of its weights."""
        weights = self._model.state_dict(keep_vars=True)
        kept = {name: weights[name].detach().clone() for name in self._averages}
        try:
            self._write(weights, self._averages)
            yield
        finally:
            self._write(weights, kept)

    def tensors(self) -> dict[str, Tensor]:
        """Return the averages by the names of the weights, float32."""
        return dict(self._averages)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self._averages = {name: tensors[name].clone() for name in self._averages}

    @staticmethod
    def _write(weights: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in values.items():
                weights[name].copy_(value)
