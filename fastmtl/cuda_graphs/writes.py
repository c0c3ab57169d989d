"""Sink for a recorded backward of the layers, which is replayed on other numbers.

A recording depends on no number of a batch that the host knows. The T gradients of a weight are
therefore one product with the tasks' offsets on the device (`torch.nn.functional.grouped_mm`),
written into J's columns at their fixed address. Backward is recorded twice: one recording stores,
one adds. After each replay `mark_written` updates the host state of `Jacobian` and `StackSink`.
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

# grouped_mm needs multiples of this many columns: 16 bytes in bfloat16.
_COLUMNS = 8


class RecordedWrites(Sink):
    """Write task gradients of `parameters`, dense parameters of `sink`, into its J.

    The rows of `table`, a sparse parameter, stay in `rows` for `StackSink.deliver_rows`.
    offsets: int32 [T + 1] on the device, the rows of the tasks. num_rows: N >= offsets[T].
    dtype: of the rows.
    Attribute stores: the result of `Jacobian.take` for the recording. The gradients of a task
    without rows are undefined in a recording that stores, and zeros in one that adds.
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
        self.order: list[nn.Parameter] = []  # in the order of backward's writes
        self._offsets = offsets
        self._ones = torch.ones(num_rows, _COLUMNS, dtype=dtype, device=offsets.device)
        self._absent = torch.empty(0)

    def begin(self, *, stores: bool) -> None:
        """Begin a recorded backward."""
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
        rows: Tensor,
        x: Tensor,
        segments: Segments,
        needed: Sequence[bool],
    ) -> list[Tensor | None]:
        self._write_linears(weights, biases, rows, x)
        return [None] * (len(weights) + len(biases))

    def _write_linears(
        self, weights: Sequence[nn.Parameter], biases: Sequence[nn.Parameter | None], dy: Tensor, x: Tensor
    ) -> None:
        """Write the gradients of k Linears; dy [N, k out] and x [N, in] have one dtype.

        The sums for a bias are a product with ones. A product with the tasks' indicator matrix
        would spread non-finite numbers of one task to the others.
        """
        for parameters, right in ((weights, x), (biases, self._ones)):
            wanted = [parameter for parameter in parameters if parameter is not None and self.wants(parameter)]
            if not wanted:
                continue
            found = self._product(dy, right)
            found = found if parameters is weights else found[..., 0]
            columns = self.jacobian.adjacent(wanted) if len(wanted) == len(parameters) else None
            if columns is not None:
                self._write_columns(columns, found)
                self.order += wanted
                continue
            for parameter, part in zip(parameters, found.chunk(len(parameters), dim=1), strict=True):
                if parameter is not None and self.wants(parameter):
                    self._write(parameter, part)

    def deliver(self, parameter: nn.Parameter, gradients: Tensor) -> Tensor | None:
        """Write gradients as the sink does, with zeros for tasks without rows."""
        self._write(parameter, gradients)
        return None

    def deliver_rows(
        self, table: nn.Parameter, ids: Tensor, rows: Tensor, token_offsets: tuple[int, ...]
    ) -> Tensor | None:
        """Keep the rows of a sparse table; sum those of a dense table by id and write the sums.

        The sums are a product with the ids' indicators: its order of addition is fixed, unlike that
        of atomics. token_offsets: of the buffers, not used.
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
        """Mark the parameters as written in the sink, after the recorded backward wrote into J."""
        for parameter in self.order:
            sink.written(parameter)

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the products [T, m, n] of left [N, m] and right [N, n] over each task's rows."""
        found = grouped_mm(left.t(), right, offs=self._offsets[1:])
        if not self.stores:  # in place: a masked float32 copy would be as large as J
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
