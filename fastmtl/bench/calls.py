"""The number of operators that a step calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

_OPTIMIZER = "Optimizer.step#"  # torch's own range


class OperatorCalls(NamedTuple):
    """Numbers of operator calls.

    operators: all calls that the dispatcher saw, nested ones included. without_optimizer: those
    outside the optimiser's `step`. outermost: those of without_optimizer that no other operator
    called.
    """

    operators: int
    without_optimizer: int
    outermost: int


def operator_calls(step: Callable[[], object]) -> OperatorCalls:
    """Count the operators of one step with torch.profiler: torch's and fastmtl's, on all threads.

    Work that a compiled graph does without the dispatcher is not seen.
    """
    found = operators(step)
    outside = [event for event in found if not any(name.startswith(_OPTIMIZER) for name in around(event))]
    outermost = [event for event in outside if not any(_is_operator(name) for name in around(event))]
    return OperatorCalls(len(found), len(outside), len(outermost))


def operators(step: Callable[[], object]) -> list[FunctionEvent]:
    """Return every operator call of one step."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    events = profiler.events()
    assert events is not None
    return [event for event in events if _is_operator(event.name)]


def around(event: FunctionEvent) -> Iterator[str]:
    """Yield the names of the operators and ranges that contain an event, innermost first."""
    while event.cpu_parent is not None:
        event = event.cpu_parent
        yield event.name


def _is_operator(name: str) -> bool:
    # The profiler records the nodes of a backward graph, too.
    return "::" in name and "autograd::" not in name
