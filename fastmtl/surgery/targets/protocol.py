"""Protocol of a target: surgery's view of a DeepSpeed engine or a torch optimizer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastmtl.surgery.merged import Merged
from fastmtl.surgery.targets.adamw import SurgeryAdamW


class Target(Protocol):
    """Owner of the parameters, which gets each step's gradients.

    It gets merged gradients by `hand_over`, or computes gradients itself by `backward` of a loss.

    parameters: the trainable ones.
    names: names of parameters by id, for messages.
    stacks: merged gradients can be handed over; otherwise a step needs `replay`.
    merges: there may be a `merging_optimizer`.
    can_discard: `discard` can drop gradients after they were handed over.
    one_backward: a forward allows a single backward (ZeRO 3, fully_shard).
    sums_ranks: `sum_over_ranks` gives sums, so surgery has the whole gradient before `hand_over`.
    clipping: the way to clip gradients without surgery, for messages.
    per_task: the way to have a backward pass per task, for messages.
    sharded: fully_shard has sharded the parameters, and modules have other tensors in forward.
    factor: multiplies merged gradients before they are handed over.
    """

    parameters: list[nn.Parameter]
    names: dict[int, str]
    device: torch.device
    stacks: bool
    merges: bool
    can_discard: bool
    one_backward: bool
    sums_ranks: bool
    sharded: bool
    clipping: str
    per_task: str
    factor: float

    def learn_names(self, model: nn.Module) -> None:
        """Use the names of `model` in messages, for parameters that have none."""
        ...

    def arranged(self, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        """Return `parameters` in the order in which J should store them."""
        ...

    def model(self, training_pass: bool) -> Any:
        """Return the model to call. training_pass: the target's `backward` follows."""
        ...

    def autocast(self, training_pass: bool) -> AbstractContextManager[Any]:
        """Return the context in which `model` runs its forward."""
        ...

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of `loss` to the step's gradients, by the target's own backward.

        last: True for the step's last micro-batch.
        """
        ...

    def wants_float32(self) -> bool:
        """Return True if merged gradients must be handed over in float32.

        The target then multiplies them by a loss scale, or they are summed over ranks.
        """
        ...

    def sum_over_ranks(self, gradients: Merged, reached: Collection[int]) -> Collection[int]:
        """Replace the gradients by their sums over ranks; return the ids that any rank has reached.

        Does nothing and returns `reached` if the target reduces gradients after `hand_over`, or has
        a single process. Arguments: see `hand_over`, which this call precedes.
        """
        ...

    def hand_over(self, gradients: Merged, reached: Collection[int]) -> None:
        """Remove every gradient from the mapping and make it the gradient of its parameter.

        A gradient to which there is no other reference becomes `.grad` itself, any other is copied.

        gradients: those of all trainable parameters, after `sum_over_ranks`. reached: ids of the
        parameters that a loss of the step depends on, as `sum_over_ranks` has returned them; the
        gradients of the others are zeros.
        """
        ...

    def check_trained(self) -> None:
        """Raise UserError if a parameter was frozen or unfrozen since construction."""
        ...

    def check_norm(self, parameters: Sequence[nn.Parameter], expected: float) -> None:
        """Raise UserError if its own backward gave the parameters a gradient of another norm.

        Only a target with `sharded` measures it, and only if it had no gradient before.
        """
        ...

    def merging_optimizer(self, norm: float | None) -> SurgeryAdamW | None:
        """Return the optimizer that merges this step's task gradients itself; None if none does.

        norm: of the merged gradient, None if it is unknown.
        """
        ...

    def begin(self) -> None:
        """Start a step: drop what a failed one has left.

        Raises UserError if the new step would overwrite unused gradients.
        """
        ...

    def check_forward(self) -> None:
        """Raise UserError if the losses come from a forward of the engine instead of its module.

        DeepSpeed then expects its own backward, but surgery hands gradients over.
        """
        ...

    def loss_scale(self) -> float:
        """Return the factor by which the loss is multiplied before backward; 1 without fp16."""
        ...

    def backs_off(self) -> bool:
        """Return True if the target itself skips a step with an overflow and reduces its scale."""
        ...

    def discard(self) -> None:
        """Drop the gradients that were handed over, and skip the update."""
        ...
