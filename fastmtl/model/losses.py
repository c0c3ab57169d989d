"""Losses by name, one value per example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from fastmtl.config import TaskConfig
from fastmtl.errors import UserError, unknown_name


@dataclass(frozen=True)
class Loss:
    """function: outputs float32 [E, num_outputs], targets [E] -> losses [E]; types: task types that it fits."""

    function: Callable[[Tensor, Tensor], Tensor]
    types: tuple[str, ...]


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """- log softmax(outputs)[target]."""
    return functional.cross_entropy(outputs, targets, reduction="none")


def bce(outputs: Tensor, targets: Tensor) -> Tensor:
    """- log sigmoid(output) for class 1, - log(1 - sigmoid(output)) for class 0."""
    return functional.binary_cross_entropy_with_logits(outputs.squeeze(1), targets.float(), reduction="none")


def mse(outputs: Tensor, targets: Tensor) -> Tensor:
    """(output - target)^2, in squared fourths of the label range (see outputs.py)."""
    return functional.mse_loss(outputs.squeeze(1), targets.float(), reduction="none")


LOSSES = {
    "cross_entropy": Loss(cross_entropy, ("classification",)),
    "bce": Loss(bce, ("binary",)),
    "mse": Loss(mse, ("regression",)),
}


def build_loss(task: TaskConfig) -> Callable[[Tensor, Tensor], Tensor]:
    """The task's loss. Raises UserError for an unknown name or one that does not fit the task's type."""
    if task.loss_name not in LOSSES:
        raise unknown_name("loss", task.loss_name, LOSSES)
    loss = LOSSES[task.loss_name]
    if task.type not in loss.types:
        fitting = ", ".join(name for name, other in LOSSES.items() if task.type in other.types)
        raise UserError(f"loss: {task.loss_name} does not fit a {task.type} task; use {fitting}")
    return loss.function
