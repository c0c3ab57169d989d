"""A DeepSpeed engine with `FlatParameters` as a target."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl.errors import UserError
from fastmtl.surgery.differentiate import differentiate
from fastmtl.surgery.merged import Merged, unshared
from fastmtl.surgery.targets.engine import EngineTarget
from fastmtl.surgery.targets.flat import FlatParameters
from fastmtl_kernels.cast import cast


class FlatTarget(EngineTarget):
    """Target that turns autograd's gradients of the model into those of the flat parameters."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self._flat: FlatParameters = engine.module
        self._named_parameters = list(self._flat.model.named_parameters())
        self.names = {id(p): name for name, p in self._named_parameters if p.requires_grad}
        self.parameters = self._flat.leaves()
        if not self.stacks:
            raise UserError("FlatParameters: ZeRO 3 and offload take the model as it is; use ZeRO 0, 1 or 2 without")
        self._held: list[Tensor] = []

    def begin(self) -> None:
        self._held = []

    def arranged(self, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        """Return `parameters`, sorted so that those in one flat parameter are adjacent.

        Their merged gradients are then adjacent in J, too, and need no copy.
        """
        wanted = {id(parameter) for parameter in parameters}
        return [parameter for parameter in self.parameters if id(parameter) in wanted]

    def model(self, training_pass: bool) -> Any:
        """Return the model, never the engine: no engine.backward of the loss follows."""
        return super().model(training_pass=False)

    def autocast(self, training_pass: bool) -> AbstractContextManager[Any]:
        return super().autocast(training_pass=False)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add autograd's gradients of the model's parameters over the micro-batches.

        The last micro-batch hands the sums over to DeepSpeed.
        """
        self._own_forward = False
        self.check_trained()
        scale = self.loss_scale()
        found = differentiate([(loss, self.factor * scale)], self.parameters, self.names)
        gradients = Merged()
        for parameter, gradient in zip(self.parameters, found, strict=True):
            gradients[id(parameter)] = torch.zeros_like(parameter) if gradient is None else gradient
        del found, gradient
        gathered = unshared(self._flat.gather(gradients))
        if self._held or not last:  # float32, since 16 bits would round every sum
            gathered = [cast(gradient, torch.float32) for gradient in gathered]
        if self._held:
            torch._foreach_add_(gathered, self._held)
        self._held = [] if last else gathered
        if last:
            self._carry(gathered, self._flat.trained(), scale)

    def hand_over(self, gradients: Merged, reached: Collection[int]) -> None:
        self._carry(self._flat.gather(gradients), self._flat.trained())
