"""How many operators a step calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

_OPTIMIZER = "Optimizer.step#"  # torch's own range


class OperatorCalls(NamedTuple):
    """operators: all that the dispatcher saw, those that another operator called as well. without_optimizer: less
    those inside the optimiser's `step`. outermost: of these the ones that no other operator called.
    """

    operators: int
    without_optimizer: int
    outermost: int


def operator_calls(step: Callable[[], object]) -> OperatorCalls:
    """Of one step, by torch.profiler: torch's operators and fastmtl's own, on whichever thread. What a compiled graph
    does without the dispatcher is not seen.
    """
    found = operators(step)
    outside = [event for event in found if not any(name.startswith(_OPTIMIZER) for name in around(event))]
    outermost = [event for event in outside if not any(_is_operator(name) for name in around(event))]
    return OperatorCalls(len(found), len(outside), len(outermost))


def operators(step: Callable[[], object]) -> list[FunctionEvent]:
    """Every call of an operator in one step."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    events = profiler.events()
    assert events is not None
    return [event for event in events if _is_operator(event.name)]


def around(event: FunctionEvent) -> Iterator[str]:
    """Names of the operators and ranges that an event is in, from the innermost."""
    while event.cpu_parent is not None:
        event = event.cpu_parent
        yield event.name


def _is_operator(name: str) -> bool:
    # The nodes of a backward graph are recorded, too.
    return "::" in name and "autograd::" not in name
