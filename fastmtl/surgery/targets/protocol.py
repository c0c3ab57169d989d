"""The owner of the parameters, as surgery needs it."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastmtl.surgery.merged import Merged
from fastmtl.surgery.targets.adamw import SurgeryAdamW


class Target(Protocol):
    """Takes a step's gradients: from losses, or merged already.

    parameters: the trainable ones. names: of parameters by id, for messages. stacks: merged gradients can be handed
    over; without it a step needs `replay`. merges: there may be a `merging_optimizer`. can_discard: `discard` can drop
    gradients that are not finite after they were handed over. factor: merged gradients are multiplied by it before
    they are handed over.
    """

    parameters: list[nn.Parameter]
    names: dict[int, str]
    device: torch.device
    stacks: bool
    merges: bool
    can_discard: bool
    factor: float

    def arranged(self, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        """Return the parameters in the order in which J has them."""
        ...

    def model(self, training_pass: bool) -> Any:
        """Return the model to call. training_pass: a `backward` of the target follows."""
        ...

    def autocast(self, training_pass: bool) -> AbstractContextManager[Any]:
        """Return the context in which `model` runs its forward."""
        ...

    def backward(self, loss: Tensor, last: bool) -> None:
        """Run the target's own backward. last: of the step's last micro-batch."""
        ...

    def scales(self) -> bool:
        """Return whether the target multiplies merged gradients once more, so that they stay float32 until then."""
        ...

    def hand_over(self, gradients: Merged, reached: Collection[int]) -> None:
        """Take every gradient out of the mapping: one that nobody else holds becomes `.grad` as it is, any other is
        copied. reached: ids of the parameters that a loss of the step has reached on this rank; the gradients of
        others are zeros.
        """
        ...

    def check_trained(self) -> None:
        """Raise UserError where other parameters are trainable than when the target was made."""
        ...

    def merging_optimizer(self, norm: float | None) -> SurgeryAdamW | None:
        """Return the optimizer that takes task gradients in place of merged ones, None where there is none.

        norm: of the merged gradient, None where it is unknown.
        """
        ...

    def begin(self) -> None:
        """Raise UserError where a step's first gradient comes too early."""
        ...

    def check_forward(self) -> None:
        """Raise UserError where losses whose gradients will be handed over come from the target's own forward."""
        ...

    def loss_scale(self) -> float: ...

    def backs_off(self) -> bool:
        """Return whether the target answers an overflow with a smaller loss scale."""
        ...

    def discard(self) -> None:
        """Drop the gradients that were handed over, and skip the update."""
        ...
