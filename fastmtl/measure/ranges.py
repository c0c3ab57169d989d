"""Named ranges of time, the phases of a step, for torch.profiler and for `fastmtl profile`.

data: draw and pack a batch and move it to the device. forward, backward: the model's. surgery: the
Gramian, the tasks' weights and the merge of task gradients. communication: hand the merged gradient
to the engine, which sums it over ranks; surgery's own collectives. optimiser: clip, update, and
gather the weights over ranks. Without a listener or profiler a range costs a few microseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeVar

from torch.profiler import record_function

Name = Literal["data", "forward", "backward", "surgery", "communication", "optimiser"]
NAMES: tuple[Name, ...] = ("data", "forward", "backward", "surgery", "communication", "optimiser")
PREFIX = "step: "
# Called with a range's name when the range begins (True) and ends (False).
Listener = Callable[[Name, bool], None]
Item = TypeVar("Item")
_listeners: list[Listener] = []


@contextmanager
def profile_range(name: Name) -> Iterator[None]:
    """Mark the time of a block as range `name`. Ranges may nest."""
    with record_function(PREFIX + name):
        for listener in _listeners:
            listener(name, True)
        try:
            yield
        finally:
            for listener in _listeners:
                listener(name, False)


def profile_iter(name: Name, items: Iterable[Item]) -> Iterator[Item]:
    """Yield the items. The time to make an item is in range `name`, the time to use it is not."""
    iterator = iter(items)
    while True:
        with profile_range(name):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Call the listener at the begin and end of every range inside the context."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
