"""What GradientSurgery is given besides its options: names, weights and parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from fastmtl.errors import UserError, quoted, unknown_name
from fastmtl.surgery.tables import whole_shape
from fastmtl.surgery.targets import Target


def check_tasks(tasks: Sequence[str]) -> list[str]:
    """Raises UserError for none, and for a name given twice."""
    names = [] if isinstance(tasks, str) else list(tasks)
    if not names:
        raise UserError(f"tasks: give the list of their names, got {tasks!r}")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"tasks: {name} is there twice")
    return names


def check_parameters(argument: str, given: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Each parameter once, in the order given. Raises UserError, naming `argument`, for what is no parameter."""
    way_out = f"give parameters, for example {argument}=model.encoder.parameters()"
    if isinstance(given, Tensor | nn.Module | str) or not isinstance(given, Iterable):
        raise UserError(f"{argument} is of type {type(given).__name__}, not a list: {way_out}")
    found = {}
    for one in given:
        if isinstance(one, tuple):
            raise UserError(f"{argument} has pairs of names and parameters: use parameters() for named_parameters()")
        if not isinstance(one, Tensor):
            raise UserError(f"{argument} has {quoted(one)}, which is no parameter: {way_out}")
        found[id(one)] = one
    return list(found.values())


def check_task_weights(given: Mapping[str, float], tasks: list[str], argument: str = "task_weights") -> list[float]:
    """Every task's weight in their order, 1 by default. Raises UserError, naming `argument`, for an unknown task and a
    bad number.
    """
    for name, weight in given.items():
        if name not in tasks:
            raise unknown_name(f"task in {argument}", name, tasks)
        if not (math.isfinite(weight) and weight >= 0):
            raise UserError(f"{argument}: {name}: {weight} must be a number that is not negative")
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
