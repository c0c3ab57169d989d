"""What takes the place of the sink while the layers' backward is recorded, to run again on other numbers.

What is recorded may depend on no number that the host knows of a batch. So here a weight's T gradients come from one
product with the tasks' offsets on the device (`torch.nn.functional.grouped_mm`), into J's columns at their fixed
address, and whether they are stored or added is one of two recordings. What `Jacobian` and `TaskGradients` keep on the
host of a write is told by `tell`, each time the recording runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm

from fastmtl.surgery.jacobian import Jacobian
from fastmtl.surgery.task_gradients import TaskGradients

# Of the ones that a bias's sums are a product with: the fewest that grouped_mm takes, 16 bytes in bfloat16.
_ONES = 8


class RecordedWrites(TaskGradients):
    """Of `parameters`, all of them dense ones of `sink`, in mode `stack`.

    offsets: int32 [T + 1] on the device, rows of the tasks. num_rows: N >= offsets[T]. dtype: of the rows.
    stores: what `Jacobian.take` says of the recording. The gradients that a task without rows gets are undefined where
    it stores, zeros where it adds.
    """

    def __init__(
        self,
        sink: TaskGradients,
        parameters: Sequence[nn.Parameter],
        offsets: Tensor,
        num_rows: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(parameters, sink.num_tasks, dtype=sink.dtype)
        self.mode = "stack"
        self.stores = False
        self.jacobian: Jacobian = sink.stack_of(parameters[0])
        self.order: list[nn.Parameter] = []  # in which backward writes
        self._offsets = offsets
        self._ones = torch.ones(num_rows, _ONES, dtype=dtype, device=offsets.device)
        self._absent = torch.empty(0)

    def begin(self, *, stores: bool) -> None:
        """At the beginning of a backward that is recorded."""
        self.stores, self.order = stores, []
        self._absent = self._offsets.diff() == 0

    def expect(self, *parameters: nn.Parameter | None) -> None:
        """`tell` does."""

    def linear(self, weight: nn.Parameter, bias: nn.Parameter | None, dy: Tensor, x: Tensor) -> None:
        """dy [N, out] and x [N, in] of one dtype. A bias's sums are a product with ones: one with the tasks' indicator
        would carry what is not finite from one task into the others.
        """
        for parameter, right in ((weight, x), (bias, self._ones)):
            if parameter is not None and self.wants(parameter):
                found = grouped_mm(dy.t(), right, offs=self._offsets[1:])
                if not self.stores:  # in a float32 of its own it would be as large as J
                    found.masked_fill_(self._absent[:, None, None], 0)
                self._write(parameter, found if parameter is weight else found[..., 0])

    def deliver(self, parameter: nn.Parameter, gradients: Tensor) -> Tensor | None:
        """As the sink's, with zeros for tasks without rows."""
        self._write(parameter, gradients)
        return None

    def deliver_rows(self, *_: Any) -> Tensor | None:
        raise RuntimeError("tables' gradients have as many rows as the batch: they cannot be recorded")

    def tell(self, sink: TaskGradients) -> None:
        """That the recorded backward has written into the sink's J."""
        for parameter in self.order:
            sink.written(parameter)

    def _write(self, parameter: nn.Parameter, gradients: Tensor) -> None:
        columns = self.jacobian.columns_of(parameter)
        if self.stores:
            columns.copy_(gradients)
        else:
            columns += gradients
        self.order.append(parameter)
