"""How many operators a step calls."""

from __future__ import annotations

from collections.abc import Callable
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
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    events = profiler.events()
    assert events is not None
    operators = [event for event in events if _is_operator(event.name)]
    outside = [event for event in operators if not _inside(event, lambda name: name.startswith(_OPTIMIZER))]
    outermost = [event for event in outside if not _inside(event, _is_operator)]
    return OperatorCalls(len(operators), len(outside), len(outermost))


def _is_operator(name: str) -> bool:
    # The nodes of a backward graph are recorded, too.
    return "::" in name and "autograd::" not in name


def _inside(event: FunctionEvent, of: Callable[[str], bool]) -> bool:
    parent = event.cpu_parent
    while parent is not None:
        if of(parent.name):
            return True
        parent = parent.cpu_parent
    return False
