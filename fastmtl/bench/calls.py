"""Counts of the operators that a training step calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

_OPTIMIZER = "Optimizer.step#"  # beginning of the profiler range that torch's optimisers open


class OperatorCalls(NamedTuple):
    """Numbers of operator calls in one step.

    operators: all calls through torch's dispatcher, including those that another operator makes.
    without_optimizer: the calls outside the optimiser's `step`. outermost: the calls outside the
    optimiser's `step` that no other operator makes.
    """

    operators: int
    without_optimizer: int
    outermost: int


def operator_calls(step: Callable[[], object]) -> OperatorCalls:
    """Count the calls of torch's and fastmtl's operators in one step, on all threads.

    torch.profiler records the calls. A compiled graph computes without the dispatcher, and such
    work is not counted.
    """
    found = operators(step)
    outside = [event for event in found if not any(name.startswith(_OPTIMIZER) for name in around(event))]
    outermost = [event for event in outside if not any(_is_operator(name) for name in around(event))]
    return OperatorCalls(len(found), len(outside), len(outermost))


def operators(step: Callable[[], object]) -> list[FunctionEvent]:
    """Run one step, and return an event of torch.profiler for every operator call."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    events = profiler.events()
    assert events is not None
    return [event for event in events if _is_operator(event.name)]


def around(event: FunctionEvent) -> Iterator[str]:
    """Yield the names of the operators and profiler ranges around an event, innermost first."""
    while event.cpu_parent is not None:
        event = event.cpu_parent
        yield event.name


def _is_operator(name: str) -> bool:
    # The profiler also records the nodes of autograd's graph (`autograd::...`), which are no
    # operators.
    return "::" in name and "autograd::" not in name
