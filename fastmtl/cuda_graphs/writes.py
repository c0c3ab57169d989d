"""What takes the place of the sink while the layers' backward is recorded, to run again on other numbers.

What is recorded may depend on no number that the host knows of a batch. So here a weight's T gradients come from one
product with the tasks' offsets on the device (`torch.nn.functional.grouped_mm`), into J's columns at their fixed
address, and whether they are stored or added is one of two recordings. What `Jacobian` and `TaskGradients` keep on the
host of a write is told by `mark_written`, each time the recording runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm

from fastmtl.surgery.jacobian.dense import Jacobian
from fastmtl.surgery.sinks.task_gradients import TaskGradients

# Columns that grouped_mm takes come in this many, 16 bytes in bfloat16.
_COLUMNS = 8


class RecordedWrites(TaskGradients):
    """Of `parameters`, all of them dense ones of `sink`, in mode `stack`; and of `table`, an embedding table among its
    sparse ones, whose rows are left in `rows` for `TaskGradients.deliver_rows`.

    offsets: int32 [T + 1] on the device, rows of the tasks. num_rows: N >= offsets[T]. dtype: of the rows.
    stores: what `Jacobian.take` says of the recording. The gradients that a task without rows gets are undefined where
    it stores, zeros where it adds.
    """

    def __init__(
        self,
        sink: TaskGradients,
        parameters: Sequence[nn.Parameter],
        table: nn.Parameter | None,
        offsets: Tensor,
        num_rows: int,
        dtype: torch.dtype,
    ) -> None:
        sparse = [] if table is None else [table]
        super().__init__([*parameters, *sparse], sink.num_tasks, sparse=sparse, dtype=sink.dtype)
        self.anchor = torch.zeros((), device=offsets.device, requires_grad=True)
        self.rows: Tensor | None = None
        self.mode = "stack"
        self.stores = False
        self.jacobian: Jacobian = sink.stack_of(parameters[0])
        self.order: list[nn.Parameter] = []  # in which backward writes
        self._offsets = offsets
        self._ones = torch.ones(num_rows, _COLUMNS, dtype=dtype, device=offsets.device)
        self._absent = torch.empty(0)

    def begin(self, *, stores: bool) -> None:
        """At the beginning of a backward that is recorded."""
        self.stores, self.order = stores, []
        self._absent = self._offsets.diff() == 0

    def expect(self, *parameters: nn.Parameter | None) -> None:
        """`mark_written` does."""

    def linear(self, weight: nn.Parameter, bias: nn.Parameter | None, dy: Tensor, x: Tensor) -> None:
        """dy [N, out] and x [N, in] of one dtype."""
        self.linears([weight], [bias], dy, x)

    def linears(
        self, weights: Sequence[nn.Parameter], biases: Sequence[nn.Parameter | None], dy: Tensor, x: Tensor
    ) -> None:
        """dy [N, k out] and x [N, in] of one dtype, for k Linears. A bias's sums are a product with ones: one with the
        tasks' indicator would carry what is not finite from one task into the others.
        """
        for parameters, right in ((weights, x), (biases, self._ones)):
            wanted = [parameter for parameter in parameters if parameter is not None and self.wants(parameter)]
            if not wanted:
                continue
            found = self._product(dy, right)
            found = found if parameters is weights else found[..., 0]
            columns = self.jacobian.beside(wanted) if len(wanted) == len(parameters) else None
            if columns is not None:
                self._write_columns(columns, found)
                self.order += wanted
                continue
            for parameter, part in zip(parameters, found.chunk(len(parameters), dim=1), strict=True):
                if parameter is not None and self.wants(parameter):
                    self._write(parameter, part)

    def deliver(self, parameter: nn.Parameter, gradients: Tensor) -> Tensor | None:
        """As the sink's, with zeros for tasks without rows."""
        self._write(parameter, gradients)
        return None

    def deliver_rows(
        self, table: nn.Parameter, ids: Tensor, rows: Tensor, token_offsets: tuple[int, ...]
    ) -> Tensor | None:
        """A dense table's sums over equal ids are a product with their indicators: of a fixed order, unlike sums by
        atomics. token_offsets is of the buffers.
        """
        if self.is_sparse(table):
            self.rows = rows
        elif self.wants(table):
            columns = -(-len(table) // _COLUMNS) * _COLUMNS
            indicators = (ids[:, None] == torch.arange(columns, device=ids.device)).to(rows.dtype)
            self._write(table, self._product(indicators, rows)[:, : len(table)])
        return None

    def mark_written(self, sink: TaskGradients) -> None:
        """That the recorded backward has written into the sink's J."""
        for parameter in self.order:
            sink.written(parameter)

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        """left [N, m], right [N, n] -> their product over each task's rows, [T, m, n]."""
        found = grouped_mm(left.t(), right, offs=self._offsets[1:])
        if not self.stores:  # in a float32 of its own it would be as large as J
            found.masked_fill_(self._absent[:, None, None], 0)
        return found

    def _write(self, parameter: nn.Parameter, gradients: Tensor) -> None:
        self._write_columns(self.jacobian.columns_of(parameter), gradients)
        self.order.append(parameter)

    def _write_columns(self, columns: Tensor, gradients: Tensor) -> None:
        if self.stores:
            columns.copy_(gradients)
        else:
            columns += gradients
