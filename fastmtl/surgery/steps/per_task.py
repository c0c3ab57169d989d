"""One backward pass per task, for a model whose layers do not write into the sink."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from fastmtl.surgery.differentiate import differentiate, leaves_of
from fastmtl.surgery.losses import Losses
from fastmtl.surgery.parts import Parts
from fastmtl.surgery.sinks.stack import StackSink


def backward_per_task(
    parts: Parts,
    sink: StackSink,
    losses: Losses,
    factor: Callable[[str], float],
    add_own: Callable[[Sequence[Tensor | None]], None],
    reach_own: Callable[[set[int]], None],
) -> None:
    """Add each task's gradients of the shared parameters to J.

    factor: returns the factor of a task's summed loss. add_own: adds one task's gradients of
    `parts.own`. reach_own: receives the ids of the tensors that a loss without rows depends on;
    their gradients are zeros.
    """
    for task, name in enumerate(parts.tasks):
        if name not in losses:
            continue
        loss, rows = losses[name]
        if rows == 0:  # its leaves get a zero gradient, as in joint training
            leaves = leaves_of(loss)
            for parameter in parts.shared:
                if id(parameter) in leaves:
                    sink.reach(parameter)
            reach_own(leaves)
            continue
        wanted = [*parts.shared, *parts.own]
        gradients = differentiate([(loss, factor(name))], wanted, parts.target.names, retain_graph=True)
        for parameter, gradient in zip(parts.shared, gradients, strict=False):
            if gradient is None:
                continue
            if sink.is_sparse(parameter):
                ids = gradient.abs().sum(1).nonzero().squeeze(1)
                sink.add_rows(parameter, task, ids, gradient[ids])
            else:
                sink.stack_of(parameter).add_task(parameter, task, gradient)
        add_own(gradients[len(parts.shared) :])
