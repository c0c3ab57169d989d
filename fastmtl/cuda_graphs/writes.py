"""The sink while the layers' backward is recorded, to be replayed on other numbers.

A recording depends on no number that the host knows of a batch. So a weight's T gradients come
from one product with the tasks' offsets on the device (`torch.nn.functional.grouped_mm`), into J's
columns at their fixed address, and there are two recordings: one stores, one adds. `mark_written`
updates what `Jacobian` and `StackSink` keep on the host, each time a recording runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm

from fastmtl.surgery.jacobian.dense import Jacobian
from fastmtl.surgery.segments import Segments
from fastmtl.surgery.sinks.sink import Sink
from fastmtl.surgery.sinks.stack import StackSink

# Columns that grouped_mm takes come in this many, 16 bytes in bfloat16.
_COLUMNS = 8


class RecordedWrites(Sink):
    """Writes gradients of `parameters`, dense ones of `sink`, into its J. The rows of `table`, one of its sparse
    parameters, are left in `rows` for `StackSink.deliver_rows`.

    offsets: int32 [T + 1] on the device, rows of the tasks. num_rows: N >= offsets[T]. dtype: of the rows.
    stores: result of `Jacobian.take` for the recording. Gradients of a task without rows are undefined where it stores,
    zeros where it adds.
    """

    def __init__(
        self,
        sink: StackSink,
        parameters: Sequence[nn.Parameter],
        table: nn.Parameter | None,
        offsets: Tensor,
        num_rows: int,
        dtype: torch.dtype,
    ) -> None:
        sparse = [] if table is None else [table]
        super().__init__([*parameters, *sparse], sink.num_tasks, sparse=sparse)
        self.arm(offsets.device)
        self.rows: Tensor | None = None
        self.stores = False
        self.jacobian: Jacobian = sink.stack_of(parameters[0])
        self.order: list[nn.Parameter] = []  # in which backward writes
        self._offsets = offsets
        self._ones = torch.ones(num_rows, _COLUMNS, dtype=dtype, device=offsets.device)
        self._absent = torch.empty(0)

    def begin(self, *, stores: bool) -> None:
        """Begin a backward that is recorded."""
        self.stores, self.order = stores, []
        self._absent = self._offsets.diff() == 0

    def linear(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        dy: Tensor,
        x: Tensor,
        segments: Segments,
        needed: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        self._write_linears([weight], [bias], dy, x)
        return None, None

    def linears(
        self,
        weights: Sequence[nn.Parameter],
        biases: Sequence[nn.Parameter],
        dy: Tensor,
        x: Tensor,
        segments: Segments,
        needed: Sequence[bool],
    ) -> list[Tensor | None]:
        self._write_linears(weights, biases, dy.flatten(1), x)
        return [None] * (len(weights) + len(biases))

    def _write_linears(
        self, weights: Sequence[nn.Parameter], biases: Sequence[nn.Parameter | None], dy: Tensor, x: Tensor
    ) -> None:
        """Write the gradients of k Linears; dy [N, k out] and x [N, in] of one dtype. The sums of a bias are a product
        with ones: one with the tasks' indicator would carry what is not finite from one task into the others.
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
        """Write as the sink does, with zeros for tasks without rows."""
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

    def sparse_table(self, table: nn.Parameter, pairs: list[tuple[Tensor, Tensor]]) -> Tensor | None:
        raise AssertionError("deliver_rows takes every table")

    def mark_written(self, sink: StackSink) -> None:
        """Tell the sink that the recorded backward has written into its J."""
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
