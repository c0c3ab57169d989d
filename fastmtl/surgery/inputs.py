"""What GradientSurgery is given besides its options: names, weights and parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real

from torch import nn

from fastmtl.errors import UserError, quoted, unknown_name
from fastmtl.surgery.jacobian.tables import whole_shape
from fastmtl.surgery.parameters import check_parameters
from fastmtl.surgery.targets.target import Target


def check_tasks(tasks: Sequence[str]) -> list[str]:
    """Raises UserError for none, and for a name given twice."""
    names = [] if isinstance(tasks, str) else list(tasks)
    if not names:
        raise UserError(f"tasks: give the list of their names, got {tasks!r}")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"tasks: {name} is there twice")
    return names


def check_task_weights(given: Mapping[str, float], tasks: list[str], argument: str = "task_weights") -> list[float]:
    """Every task's weight in their order, 1 by default. Raises UserError, naming `argument`, for an unknown task and a
    bad number.
    """
    for name, weight in given.items():
        if name not in tasks:
            raise unknown_name(f"task in {argument}", name, tasks)
        if not isinstance(weight, Real) or not (math.isfinite(weight) and weight >= 0):
            raise UserError(f"{argument}: {name}: {quoted(weight)} must be a number that is not negative")
    return [float(given.get(name, 1.0)) for name in tasks]


def find_shared(
    target: Target, shared: Sequence[nn.Parameter] | None, sparse: Sequence[nn.Parameter]
) -> list[nn.Parameter]:
    """The trainable ones, each once, by default all of the target. Raises UserError for parameters that are none of the
    target's, and for sparse ones that are no shared tables.
    """
    if shared is None:
        inside = target.parameters
    else:
        shared = check_parameters("shared", shared)
        trainable = {id(p) for p in target.parameters}
        inside = target.arranged([p for p in shared if id(p) in trainable])
        strangers = [whole_shape(p) for p in shared if p.requires_grad and id(p) not in trainable]
        if strangers:
            raise UserError(
                f"shared: {len(strangers)} parameters are not the target's (the first has shape "
                f"{tuple(strangers[0])}): make the target of the model that they are of"
            )
    known = {id(p) for p in inside}
    for table in sparse:
        if table.requires_grad and id(table) not in known:
            raise UserError(f"sparse: a parameter of shape {tuple(whole_shape(table))} is not among the shared ones")
        if len(whole_shape(table)) != 2:
            raise UserError(f"sparse: an embedding table has two dimensions, got {tuple(whole_shape(table))}")
    return list(inside)


def check_sketch(sketch_size: int, sparse: Sequence[nn.Parameter]) -> None:
    """Raises UserError for a sketch that a table's row does not fit in."""
    for table in sparse:
        width = whole_shape(table)[1]
        if width > sketch_size:
            raise UserError(f"sketch_size={sketch_size} is less than a row of an embedding table: use {width} or more")
