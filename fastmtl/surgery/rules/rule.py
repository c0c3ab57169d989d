"""The type of a layer rule: how a module with shared parameters runs during surgery.

A rule computes what the module's forward computes. It differs in backward: every shared parameter's
gradients, one per task, go to the sink. A rule is one function beside its autograd.Function and one
entry in `table.py`.

A parameter is identified by its module and its name, not by the tensor that forward uses: FSDP puts
another tensor into the module for the time of its forward. So an operation takes the tensors to
compute with, as they are in the module, and in the tuple `known` the sink's parameters in the same
order. `known_to` makes that tuple. Without it, the tensors are the sink's parameters themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from fastmtl.surgery.segments import Segments
from fastmtl.surgery.sinks.sink import Sink

# The sink's parameters for the tensors of an operation, in the same order; None where it has none.
Known = tuple[nn.Parameter | None, ...]


class Rows(Protocol):
    """The rows of a batch. batch: B, their number."""

    @property
    def batch(self) -> int: ...

    def segments(self, n: int) -> Segments:
        """Return the tasks' rows among n = B k rows, k for each row of the batch.

        Only backward reads them: with rows of several tasks, they change from pass to pass.
        """

    def parameter(self, module: nn.Module, name: str) -> nn.Parameter | None:
        """Return the parameter `name` of `module` as the sink knows it, None where it is None."""


# (module, rows of the batch, sink, input with B k rows in dimension 0) -> output of the module
Rule = Callable[[Any, Rows, Sink, Tensor], Tensor]


def known_to(rows: Rows, module: nn.Module, *names: str) -> Known:
    """Return the sink's parameters for these parameters of a module."""
    return tuple(rows.parameter(module, name) for name in names)
