"""Losses of a head's outputs, by name, and the weighted sum of all losses of a task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fastmtl.config import TaskConfig
from fastmtl.errors import UserError, unknown_name
from fastmtl.model.losses.pairs import PAIR_LOSSES, PairLoss

Function = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Loss:
    """A loss of the outputs.

    function: maps outputs float32 [E, num_outputs] and targets [E] to losses [E].
    types: the task types that it supports. outputs.py gives the meaning of outputs and targets.
    """

    function: Function
    types: tuple[str, ...]


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return - log softmax(outputs)[target]."""
    return functional.cross_entropy(outputs, targets, reduction="none")


def bce(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return - log sigmoid(output) for class 1, - log(1 - sigmoid(output)) for class 0."""
    return functional.binary_cross_entropy_with_logits(outputs.squeeze(1), targets.float(), reduction="none")


def mse(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return (output - target)^2 in squared quarters of the label range (see outputs.py)."""
    return functional.mse_loss(outputs.squeeze(1), targets.float(), reduction="none")


LOSSES = {
    "cross_entropy": Loss(cross_entropy, ("classification", "regression")),
    "bce": Loss(bce, ("binary",)),
    "mse": Loss(mse, ("regression", "classification")),
}


class TaskLoss:
    """Weighted sum of the losses of one task.

    outputs: (weight, function) of the head's outputs.
    pairs: (weight, loss) of u and v; see pairs.py.
    """

    def __init__(self, outputs: list[tuple[float, Function]], pairs: list[tuple[float, PairLoss]]) -> None:
        self._outputs, self.pairs = outputs, pairs

    @property
    def reads_outputs(self) -> bool:
        return bool(self._outputs)

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the weighted sum [E] of the losses of the outputs.

        Without such a loss, return zeros that depend on the outputs.
        """
        terms = [weight * function(outputs, targets) for weight, function in self._outputs]
        return torch.stack(terms or [0.0 * outputs.sum(1)]).sum(0)

    def of_pairs(self, u: Tensor, v: Tensor, labels: Tensor) -> Tensor:
        """Return the weighted sum [E] of the losses of u, v [E, d]."""
        return torch.stack([weight * loss(u, v, labels) for weight, loss in self.pairs]).sum(0)


def build_loss(task: TaskConfig) -> TaskLoss:
    """Build the loss of a task.

    Raises UserError for an unknown name, for a loss that does not support the task, and for two
    losses that read the outputs differently.
    """
    types = {name: loss.types for name, loss in LOSSES.items()}
    types.update({name: loss.types for name, loss in PAIR_LOSSES.items()})
    for name in task.losses:
        if name not in types:
            raise unknown_name("loss", name, types)
        if task.type not in types[name]:
            fitting = " or ".join(other for other, fits in types.items() if task.type in fits)
            raise UserError(f"loss: {name} does not fit a {task.type} task; use {fitting}")
        if name in PAIR_LOSSES and task.pairs != "bi":
            raise UserError(f"loss: {name} compares the vectors of two texts: it needs pairs: bi, not pairs: cross")
    if {"cross_entropy", "mse"} <= task.losses.keys():
        raise UserError("loss: cross_entropy reads the outputs as logits and mse as a score: take one of the two")
    for key, name in (("mnr", "mnr"), ("margin", "cosine_embedding")):
        default = TaskConfig.model_fields[key].get_default(call_default_factory=True)
        if name not in task.losses and getattr(task, key) != default:
            raise UserError(
                f"{key}: a setting of the loss {name}, which this task does not have; its loss is {task.loss_name}"
            )
    return TaskLoss(
        [(weight, LOSSES[name].function) for name, weight in task.losses.items() if name in LOSSES],
        [(weight, PAIR_LOSSES[name](task)) for name, weight in task.losses.items() if name in PAIR_LOSSES],
    )
