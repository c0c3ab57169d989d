"""Names for the parts of a training step, for torch.profiler and for `fastmtl profile`.

data: drawing and packing a batch, and moving it to the device. forward, backward: of the model. surgery: Gramian,
weights and merging of task gradients. communication: handing the merged gradient to the engine, which adds it up over
ranks, and surgery's own collectives. optimiser: clipping, the update, and gathering the weights over ranks.
A range costs a few microseconds where nothing records it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeVar

from torch.profiler import record_function

Name = Literal["data", "forward", "backward", "surgery", "communication", "optimiser"]
NAMES: tuple[Name, ...] = ("data", "forward", "backward", "surgery", "communication", "optimiser")
PREFIX = "step: "
# Called with a range's name when it begins (True) and ends (False).
Listener = Callable[[Name, bool], None]
Item = TypeVar("Item")
_listeners: list[Listener] = []


@contextmanager
def profile_range(name: Name) -> Iterator[None]:
    """What runs inside the block is `name`; blocks may nest."""
    with record_function(PREFIX + name):
        for listener in _listeners:
            listener(name, True)
        try:
            yield
        finally:
            for listener in _listeners:
                listener(name, False)


def profile_iter(name: Name, items: Iterable[Item]) -> Iterator[Item]:
    """The items; making one is `name`, what the caller does with it is not."""
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
    """The listener is told of every range inside the block."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
