"""Protocol of the owner of the parameters."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastmtl.surgery.merged import Merged
from fastmtl.surgery.targets.adamw import SurgeryAdamW


class Target(Protocol):
    """Owner of the parameters that takes a step's gradients, from losses or already merged.

    parameters: the trainable ones.
    names: names of parameters by id, for messages.
    stacks: merged gradients can be handed over; otherwise a step needs `replay`.
    merges: there may be a `merging_optimizer`.
    can_discard: `discard` can drop gradients after they were handed over.
    factor: multiplies merged gradients before they are handed over.
    """

    parameters: list[nn.Parameter]
    names: dict[int, str]
    device: torch.device
    stacks: bool
    merges: bool
    can_discard: bool
    factor: float

    def arranged(self, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        """Return the parameters in the order of J."""
        ...

    def model(self, training_pass: bool) -> Any:
        """Return the model to call. training_pass: the target's `backward` follows."""
        ...

    def autocast(self, training_pass: bool) -> AbstractContextManager[Any]:
        """Return the context in which `model` runs its forward."""
        ...

    def backward(self, loss: Tensor, last: bool) -> None:
        """Run the target's own backward. last: True for the step's last micro-batch."""
        ...

    def scales(self) -> bool:
        """Return True if the target multiplies merged gradients once more.

        They stay float32 until then.
        """
        ...

    def hand_over(self, gradients: Merged, reached: Collection[int]) -> None:
        """Take every gradient out of the mapping and make it the parameter's gradient.

        A gradient that no other object holds becomes `.grad` itself, any other is copied.

        reached: ids of the parameters that a loss of the step has reached on this rank; the
        gradients of the others are zeros.
        """
        ...

    def check_trained(self) -> None:
        """Raise UserError if a parameter was frozen or unfrozen since construction."""
        ...

    def merging_optimizer(self, norm: float | None) -> SurgeryAdamW | None:
        """Return the optimizer that takes task gradients in place of merged ones, None if there is
        none.

        norm: of the merged gradient, None if it is unknown.
        """
        ...

    def begin(self) -> None:
        """Raise UserError if a new step would overwrite unused gradients."""
        ...

    def check_forward(self) -> None:
        """Raise UserError if losses come from the target's own forward.

        Their gradients are handed over, so the target's own backward does not follow.
        """
        ...

    def loss_scale(self) -> float: ...

    def backs_off(self) -> bool:
        """Return True if the target answers an overflow with a smaller loss scale."""
        ...

    def discard(self) -> None:
        """Drop the gradients that were handed over, and skip the update."""
        ...
