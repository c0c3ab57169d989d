"""Losses of a head's outputs, by name, and the weighted sum of all losses that a task has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastmtl.config import TaskConfig
from fastmtl.errors import UserError, unknown_name
from fastmtl.model.heads.batch import Examples
from fastmtl.model.losses.pairs import PAIR_LOSSES, PairLoss
from fastmtl.model.types import UNIT_TYPES
from fastmtl.model.types.spec import UnitLoss

Function = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Loss:
    """A loss of a head's outputs.

    function: maps outputs float32 [E, num_outputs] and targets [E] to losses [E]; outputs.py gives
    their meaning.
    types: the task types that the loss supports.
    """

    function: Function
    types: tuple[str, ...]


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return - log softmax(outputs)[target] of each example, [E]. outputs: [E, C]."""
    return functional.cross_entropy(outputs, targets, reduction="none")


def bce(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return - log sigmoid(output) for class 1, - log(1 - sigmoid(output)) for class 0, [E].

    With outputs and targets [E, C] of several labels it is the mean over the labels.
    """
    targets = targets.to(outputs.dtype)
    if targets.dim() == 2:
        return functional.binary_cross_entropy_with_logits(outputs, targets, reduction="none").mean(1)
    return functional.binary_cross_entropy_with_logits(outputs.squeeze(1), targets, reduction="none")


def mse(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return (output - target)^2, [E]; their unit is a quarter of the label range (outputs.py)."""
    return functional.mse_loss(outputs.squeeze(1), targets.to(outputs.dtype), reduction="none")


LOSSES = {
    "cross_entropy": Loss(cross_entropy, ("classification", "regression")),
    "bce": Loss(bce, ("binary", "multilabel")),
    "mse": Loss(mse, ("regression", "classification")),
}


class TaskLoss:
    """Weighted sum of the losses of one task.

    outputs: (weight, function) of each loss of the head's outputs.
    pairs: (weight, loss) of each loss of u and v (pairs.py).
    units: (weight, loss) of each loss of a task whose head scores units (fastmtl.model.types).
    reads_outputs: True if the task has a loss of the head's outputs, not only losses of u and v.
    """

    def __init__(
        self,
        outputs: list[tuple[float, Function]],
        pairs: list[tuple[float, PairLoss]],
        units: list[tuple[float, UnitLoss]] | None = None,
        *,
        reads_outputs: bool,
    ) -> None:
        self._outputs, self.pairs, self._units = outputs, pairs, units or []
        self.reads_outputs = reads_outputs

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the weighted sum [E] of the task's losses of the head's outputs.

        If there is no such loss, return zeros computed from the outputs, so that autograd reaches
        the head in any case.
        """
        terms = [weight * function(outputs, targets) for weight, function in self._outputs]
        return torch.stack(terms or [0.0 * outputs.sum(1)]).sum(0)

    def of_units(self, found: Examples, labels: Tensor, head: nn.Module) -> Tensor:
        """Return the weighted sum, 0-dim, of the losses of a task whose head scores units.

        found: the task's examples. labels: as in PackedBatch. head: the task's head.
        """
        terms = [weight * loss(found, labels, head).sum() for weight, loss in self._units]
        return torch.stack([*terms, 0.0 * found.outputs.sum()]).sum()

    def of_pairs(self, u: Tensor, v: Tensor, labels: Tensor) -> Tensor:
        """Return the weighted sum [E] of the task's losses of the vectors u and v [E, d]."""
        return torch.stack([weight * loss(u, v, labels) for weight, loss in self.pairs]).sum(0)


def build_loss(task: TaskConfig) -> TaskLoss:
    """Build the loss of a task.

    Raises UserError for an unknown loss, for a loss that does not support the task, for a setting
    of a loss that the task does not have, and for cross_entropy together with mse, which give the
    head's outputs different meanings.
    """
    types = {name: loss.types for name, loss in LOSSES.items()}
    types.update({name: loss.types for name, loss in PAIR_LOSSES.items()})
    if task.type in UNIT_TYPES:
        return _unit_loss(task)
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
    _check_settings(task)
    return TaskLoss(
        [(weight, LOSSES[name].function) for name, weight in task.losses.items() if name in LOSSES],
        [(weight, PAIR_LOSSES[name](task)) for name, weight in task.losses.items() if name in PAIR_LOSSES],
        reads_outputs=any(name in LOSSES for name in task.losses),
    )


def _check_settings(task: TaskConfig) -> None:
    """Raise UserError for a setting of a loss that the task does not have."""
    for key, name in (("mnr", "mnr"), ("margin", "cosine_embedding")):
        default = TaskConfig.model_fields[key].get_default(call_default_factory=True)
        if name not in task.losses and getattr(task, key) != default:
            raise UserError(
                f"{key}: a setting of the loss {name}, which this task does not have; its loss is {task.loss_name}"
            )


def _unit_loss(task: TaskConfig) -> TaskLoss:
    kind = UNIT_TYPES[task.type]
    known = kind.losses
    for name in task.losses:
        if name not in known:
            raise unknown_name(f"loss of a {task.type} task", name, known)
    _check_settings(task)
    losses = [(weight, known[name](task)) for name, weight in task.losses.items()]
    return TaskLoss([], [], losses, reads_outputs=any(name not in kind.of_vectors for name in task.losses))
