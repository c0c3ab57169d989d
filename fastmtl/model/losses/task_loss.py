"""Losses of a head's outputs, by name, and the weighted sum of all losses that a task has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastmtl.config import TaskConfig
from fastmtl.errors import UserError, unknown_name
from fastmtl.model.examples import Examples
from fastmtl.model.losses import class_losses
from fastmtl.model.losses.pairs import PAIR_LOSSES, PairLoss
from fastmtl.model.types import UNIT_TYPES
from fastmtl.model.types.spec import UnitLoss

Function = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Loss:
    """A loss of a head's outputs.

    function: maps outputs float32 [E, num_outputs] and targets [E] to losses [E]; outputs.py gives
    their meaning. None if `build` returns it.
    types: the task types that the loss supports.
    build: maps a task to the function, for a loss with settings of the task.
    """

    function: Function | None
    types: tuple[str, ...]
    build: Callable[[TaskConfig], Function] | None = None

    def of(self, task: TaskConfig) -> Function:
        """Return the function for a task."""
        function = self.function if self.build is None else self.build(task)
        assert function is not None, "a loss has a function or builds it"
        return function


def mse(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return (output - target)^2, [E]; their unit is a quarter of the label range (outputs.py)."""
    return functional.mse_loss(outputs.squeeze(1), targets.to(outputs.dtype), reduction="none")


LOSSES = {
    "cross_entropy": Loss(None, ("classification", "regression"), class_losses.cross_entropy),
    "bce": Loss(None, ("binary", "multilabel"), class_losses.bce),
    "mse": Loss(mse, ("regression", "classification")),
    "focal": Loss(None, ("classification", "binary", "multilabel"), class_losses.focal),
    "ordinal": Loss(None, ("classification",), class_losses.ordinal),
}
# Losses that give the same outputs different meanings.
READ_AS = {
    "cross_entropy": "logits",
    "focal": "logits",
    "mse": "a score",
    "ordinal": "conditional logits",
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
    meanings = {READ_AS[name]: name for name in task.losses if name in READ_AS}
    if len(meanings) > 1 and task.type in ("classification", "regression"):
        (one, first), (two, second), *_ = meanings.items()
        raise UserError(f"loss: {first} reads the outputs as {one} and {second} as {two}: take one of the two")
    _check_settings(task)
    return TaskLoss(
        [(weight, LOSSES[name].of(task)) for name, weight in task.losses.items() if name in LOSSES],
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
