"""The backward passes of a micro-batch: one, or several if rows have several tasks."""

from __future__ import annotations

from collections.abc import Sequence

from fastmtl.surgery.losses import Losses
from fastmtl.surgery.parts import Parts


def passes_of(parts: Parts) -> list[list[str]]:
    """Return the tasks of each pass of the micro-batch whose forward has run."""
    return [parts.tasks] if parts.attached is None else parts.attached.passes()


def enter_pass(parts: Parts, tasks: Sequence[str]) -> None:
    """Let the sink get the gradients of the losses of these tasks."""
    if parts.attached is not None:
        parts.attached.enter(tasks)


def losses_of_passes(parts: Parts, losses: Losses) -> list[tuple[list[str], Losses]]:
    """Return each pass's tasks and losses. A pass without a loss to differentiate is left out."""
    passes = passes_of(parts)
    if len(passes) == 1:
        return [(passes[0], losses)]
    found: list[tuple[list[str], Losses]] = []
    for tasks in passes:
        of_pass = {name: losses[name] for name in tasks if name in losses and losses[name][0].requires_grad}
        if of_pass:
            found.append((tasks, of_pass))
    return found or [(passes[0], losses)]
