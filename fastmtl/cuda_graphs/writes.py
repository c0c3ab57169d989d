"""Sink for a recorded backward of the encoder, which is replayed for other batches.

A recording repeats whatever the host decided when it was made. No decision may therefore depend on
the tasks' numbers of rows. The T gradients of a weight are one grouped matrix product
(`torch.nn.functional.grouped_mm`), which reads the tasks' offsets on the device. It is written into
the columns of the Jacobian J at their fixed address. Backward is recorded twice: one recording
overwrites the gradients in J, the other one adds to them. A replay runs no Python code, so after it
`mark_written` updates the state of `StackSink` on the host.
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

# grouped_mm needs column numbers that are multiples of _COLUMNS: 16 bytes in bfloat16.
_COLUMNS = 8


class RecordedWrites(Sink):
    """Sink that writes task gradients into the J of another sink.

    sink: the sink whose J is written. parameters: its dense parameters that the recording uses.
    table: a sparse embedding table, or None. Its gradient rows are not written but kept in the
    attribute `rows`; the caller passes them to `StackSink.deliver_rows`.
    offsets: int32 [T + 1] on the device; task t has the rows offsets[t]:offsets[t + 1].
    num_rows: N >= offsets[T], the rows of the buffers. dtype: of the buffers.
    Attribute stores: True to overwrite J, False to add to it, as `Jacobian.reserve` decides. A task
    without rows gets undefined gradients in a backward that overwrites, and zeros in one that adds.
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
        self.order: dict[nn.Parameter, None] = {}  # those written, by their last write
        self._offsets = offsets
        self._ones = torch.ones(num_rows, _COLUMNS, dtype=dtype, device=offsets.device)
        self._absent = torch.empty(0)

    def begin(self, *, stores: bool) -> None:
        """Prepare for a backward. stores: see the class."""
        self.stores, self.order = stores, {}
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
        """Write the task gradients of k Linears with a common input x [N, in].

        dy [N, k out]: the gradients of their outputs, side by side, in the dtype of x.
        A bias's gradient, the sum of a task's rows of dy, is a grouped product with ones. An
        ordinary product with a matrix of zeros and ones that selects each task's rows would spread
        NaN and inf of one task to the others, since 0 * inf is NaN.
        """
        for parameters, right in ((weights, x), (biases, self._ones)):
            wanted = [parameter for parameter in parameters if parameter is not None and self.wants(parameter)]
            if not wanted:
                continue
            stores = self._stores(wanted)
            found = self._product(dy, right, stores=stores)
            found = found if parameters is weights else found[..., 0]
            columns = self.jacobian.adjacent(wanted) if len(wanted) == len(parameters) else None
            if columns is not None:
                self._write(wanted, columns, found, stores=stores)
                continue
            for parameter, part in zip(parameters, found.chunk(len(parameters), dim=1), strict=True):
                if parameter is not None and self.wants(parameter):
                    self._write([parameter], self.jacobian.columns_of(parameter), part, stores=stores)

    def take(self, parameter: nn.Parameter, gradients: Tensor) -> Tensor | None:
        """Write the task gradients [T, *shape] of a parameter into J.

        gradients: zeros for a task without rows.
        """
        columns = self.jacobian.columns_of(parameter)
        self._write([parameter], columns, gradients, stores=self._stores([parameter]))
        return None

    def deliver_rows(
        self, table: nn.Parameter, ids: Tensor, rows: Tensor, token_offsets: tuple[int, ...]
    ) -> Tensor | None:
        """Take the gradients `rows` [N, d] of the rows `ids` [N] of an embedding table.

        A sparse table's rows are kept in the attribute `rows`. A dense table's rows are summed by
        id and the sums are written into J. The sum is a product with a matrix of zeros and ones
        [N, V], which adds in a fixed order; atomic additions would not.
        token_offsets: not used.
        """
        if self.is_sparse(table):
            self.rows = rows
        elif self.wants(table):
            columns = -(-len(table) // _COLUMNS) * _COLUMNS
            indicators = (ids[:, None] == torch.arange(columns, device=ids.device)).to(rows.dtype)
            stores = self._stores([table])
            found = self._product(indicators, rows, stores=stores)[:, : len(table)]
            self._write([table], self.jacobian.columns_of(table), found, stores=stores)
        return None

    def mark_written(self, sink: StackSink) -> None:
        """Report to `sink` that a replayed backward wrote the parameters' gradients into J."""
        for parameter in self.order:
            sink.written(parameter)

    def _stores(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Return True if a write of these parameters overwrites J: their first of the backward.

        A weight that several layers share is written once for each of them.
        """
        return self.stores and not any(parameter in self.order for parameter in parameters)

    def _product(self, left: Tensor, right: Tensor, *, stores: bool) -> Tensor:
        """Return [T, m, n]: left^T right over the rows of each task.

        left: [N, m]. right: [N, n]. stores: a task without rows may have undefined results.
        """
        found = grouped_mm(left.t(), right, offs=self._offsets[1:])
        if not stores:  # in place: a masked float32 copy would be as large as J
            found.masked_fill_(self._absent[:, None, None], 0)
        return found

    def _write(self, parameters: Sequence[nn.Parameter], columns: Tensor, found: Tensor, *, stores: bool) -> None:
        if stores:
            columns.copy_(found)
        else:
            columns += found
        for parameter in parameters:
            self.order.pop(parameter, None)
            self.order[parameter] = None
