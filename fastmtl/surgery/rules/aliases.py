"""Aliases of a parameter, one per task: each task's uses of the parameter go through its own alias.

With rows of several tasks, there is an alias for each set of tasks that a row has.

Autograd adds up the gradient of an alias over all uses, and so finds the task's gradient of the
parameter without a formula of the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastmtl.surgery.jacobian.tables import is_sharded
from fastmtl.surgery.sinks.sink import Sink


class Owned(NamedTuple):
    """A parameter by the module that has it and its name there.

    holder, name: ZeRO and FSDP may use another object inside forward, which is looked up there.
    parameter: the object that the sink knows.
    """

    holder: nn.Module
    name: str
    parameter: nn.Parameter

    @property
    def available(self) -> bool:
        """True if the parameter has its values now.

        ZeRO 3 and FSDP gather them for a module's forward.
        """
        if is_sharded(getattr(self.holder, self.name)):
            return False
        status = getattr(self.parameter, "ds_status", None)
        return status is None or status.name == "AVAILABLE"


# Number of a part of the rows -> task that the part belongs to in the pass that runs now, or -1
TaskOf = Callable[[int], int]


def aliases(owned: Owned, parts: Sequence[int], task_of: TaskOf, sink: Sink) -> tuple[Tensor, ...]:
    """Return one alias of the parameter for each of the parts into which the rows are divided."""
    return _Aliases.apply(getattr(owned.holder, owned.name), owned.parameter, tuple(parts), task_of, sink)


class _Aliases(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value: Tensor, parameter: nn.Parameter, parts: tuple[int, ...], task_of: TaskOf, sink: Sink
    ) -> Any:
        ctx.set_materialize_grads(False)
        ctx.parameter, ctx.parts, ctx.task_of, ctx.sink = parameter, parts, task_of, sink
        sink.expect(parameter)
        return tuple(value.view_as(value) for _ in parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        found: dict[int, Tensor] = {}
        for part, dy in zip(ctx.parts, gradients, strict=True):
            if dy is not None:
                task = ctx.task_of(part)
                found[task] = dy if task not in found else found[task] + dy
        gradient = ctx.sink.deliver_tasks(ctx.parameter, found) if ctx.needs_input_grad[0] and found else None
        return gradient, None, None, None, None


@contextmanager
def replaced(values: Sequence[tuple[Owned, Tensor]]) -> Iterator[None]:
    """Let the modules see `values` in place of their parameters inside the block.

    An attribute of the instance hides the parameter of the same name; `_parameters`, which
    optimizers and checkpoints read, does not change.
    """
    for owned, value in values:
        owned.holder.__dict__[owned.name] = value
    try:
        yield
    finally:
        for owned, _ in values:
            del owned.holder.__dict__[owned.name]
