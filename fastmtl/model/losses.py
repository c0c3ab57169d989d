"""Losses of a head's outputs by name, one value per example, and a task's weighted sum of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fastmtl.config import TaskConfig
from fastmtl.errors import UserError, unknown_name


@dataclass(frozen=True)
class Loss:
    """function: outputs float32 [E, num_outputs], targets [E] -> losses [E]; types: task types that it fits.

    What outputs and targets mean for a type and loss stands in outputs.py.
    """

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
    "cross_entropy": Loss(cross_entropy, ("classification", "regression")),
    "bce": Loss(bce, ("binary",)),
    "mse": Loss(mse, ("regression", "classification")),
}


def build_loss(task: TaskConfig) -> Callable[[Tensor, Tensor], Tensor]:
    """The weighted sum of the task's losses, as a `Loss.function`.

    Raises UserError for an unknown name, one that does not fit the task's type, and two that read outputs differently.
    """
    for name in task.losses:
        if name not in LOSSES:
            raise unknown_name("loss", name, LOSSES)
        if task.type not in LOSSES[name].types:
            fitting = " or ".join(other for other, loss in LOSSES.items() if task.type in loss.types)
            raise UserError(f"loss: {name} does not fit a {task.type} task; use {fitting}")
    if {"cross_entropy", "mse"} <= task.losses.keys():
        raise UserError("loss: cross_entropy reads the outputs as logits and mse as a score: take one of the two")
    terms = [(LOSSES[name].function, weight) for name, weight in task.losses.items()]

    def total(outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.stack([weight * function(outputs, targets) for function, weight in terms]).sum(0)

    return total
