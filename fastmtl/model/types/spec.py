"""The description of a task type whose head scores units: tokens, or several sequences of a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from fastmtl.config import TaskConfig
from fastmtl.data.packed_batch import Units
from fastmtl.model.examples import Examples

# (examples of a task, their labels as in PackedBatch, the task's head) -> losses of any shape, in
# float32 or wider. Their sum divided by the number of loss terms is the task's loss.
UnitLoss = Callable[[Examples, Tensor, nn.Module], Tensor]


def no_parts(task: TaskConfig, head: nn.Module) -> None:
    """Add no submodule to the head."""


@dataclass(frozen=True)
class UnitType:
    """A task type. E examples have U units, for which the head gives outputs [U, num_outputs].

    num_outputs: columns of the outputs. losses: by name, functions that return the loss of a task.
    predictions: maps examples and head to float32 [U, ...] for the user. divergence: (task, p, q,
    units) -> the distances of two outputs p and q, for SMART; it raises UserError if there is none.
    add_parts: adds submodules to a head, such as the transitions of a CRF; the head's parameters
    are read in its own modules' forward only, as ZeRO 3 demands.
    of_vectors: names of the losses that read u and v only, not the head's outputs.
    """

    num_outputs: Callable[[TaskConfig], int]
    losses: Mapping[str, Callable[[TaskConfig], UnitLoss]]
    predictions: Callable[[TaskConfig, Examples, nn.Module], Tensor]
    divergence: Callable[[TaskConfig, Tensor, Tensor, Units], Tensor]
    add_parts: Callable[[TaskConfig, nn.Module], None] = no_parts
    of_vectors: tuple[str, ...] = ()
