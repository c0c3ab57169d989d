"""J of the dense shared parameters, a buffer that the layers' backward writes into."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from fastmtl.surgery.merged import Merged
from fastmtl_kernels import combine
from fastmtl_kernels.cast import cast


class Jacobian:
    """T task gradients of `parameters`, which have P numbers in all: `buffer` [T, P] of `dtype`.

    Entries that were not written since `clear` count as zero. `clear` itself writes nothing to
    memory: the first write afterwards overwrites the old values instead of adding to them.

    reached: ids of the parameters that were written since `clear`, even with zeros. narrow: the
    dtype of the parameters if all have the same 16-bit dtype, else float32.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], num_tasks: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._parameters = list(parameters)
        sizes = [parameter.numel() for parameter in self._parameters]
        self.buffer = torch.empty(num_tasks, sum(sizes), dtype=dtype, device=device)
        self._columns = {
            id(parameter): columns.view(num_tasks, *parameter.shape)
            for parameter, columns in zip(self._parameters, self.buffer.split(sizes, dim=1), strict=True)
        }
        self._rows = {key: list(columns.unbind()) for key, columns in self._columns.items()}
        ends = list(accumulate(sizes, initial=0))
        self._spans = {key: slice(*span) for key, span in zip(self._columns, pairwise(ends), strict=True)}
        dtypes = {parameter.dtype for parameter in self._parameters}
        self.narrow = dtypes.pop() if dtypes in ({torch.bfloat16}, {torch.float16}) else torch.float32
        self._adjacent: dict[tuple[int, ...], Tensor | None] = {}
        self._written: dict[int, set[int]] = {}
        self.reached: set[int] = set()
        self.clear()

    def clear(self) -> None:
        self.reached.clear()
        self._written = {id(parameter): set() for parameter in self._parameters}

    def add(self, parameter: nn.Parameter, gradients: Tensor) -> None:
        """Add all tasks' gradients [T, *shape] of a parameter."""
        columns, written = self._columns[id(parameter)], self._written[id(parameter)]
        self.reached.add(id(parameter))
        if not written:
            columns.copy_(gradients)
        else:
            self._fill(id(parameter))
            columns += gradients
        written.update(range(len(columns)))

    def add_task(self, parameter: nn.Parameter, task: int, gradient: Tensor) -> None:
        """Add one task's gradient, of the parameter's shape."""
        row = self._rows[id(parameter)][task]
        if self._mark_written(parameter, task):
            row.copy_(gradient)
        else:
            row += gradient

    def add_product(self, parameter: nn.Parameter, task: int, left: Tensor, right: Tensor) -> None:
        """Add one task's gradient, left [out, n] times right [n, in], both of J's dtype.

        The product is computed inside `buffer`, without a temporary tensor.
        """
        row = self._rows[id(parameter)][task]
        if self._mark_written(parameter, task):
            torch.mm(left, right, out=row)
        else:
            row.addmm_(left, right)

    def add_sum(self, parameter: nn.Parameter, task: int, columns: Tensor) -> None:
        """Add one task's gradient, the sum of columns [d, n] of J's dtype over n.

        A first write computes the sum inside `buffer`, without a temporary tensor.
        """
        row = self._rows[id(parameter)][task]
        if self._mark_written(parameter, task):
            torch.sum(columns, 1, out=row)
        else:
            row += columns.sum(1)

    def add_products(self, parameters: Sequence[nn.Parameter], task: int, left: Tensor, right: Tensor) -> None:
        """Add one task's gradients of k weights of one shape, left [k out, n] times right [n, in].

        `left` holds the k weights' parts one below the other. If the weights' columns in J are
        adjacent, a single product computes all k gradients.
        """
        rows = self.adjacent(parameters)
        if rows is None:
            for parameter, part in zip(parameters, left.chunk(len(parameters)), strict=True):
                self.add_product(parameter, task, part, right)
        elif self._mark_all_written(parameters, task):
            torch.mm(left, right, out=rows[task])
        else:
            rows[task].addmm_(left, right)

    def add_sums(self, parameters: Sequence[nn.Parameter], task: int, columns: Tensor) -> None:
        """Add one task's gradients of k biases of one shape, the sums of columns [k d, n] over n.

        If the biases' columns in J are adjacent, a single sum computes all k gradients.
        """
        rows = self.adjacent(parameters)
        if rows is None:
            for parameter, part in zip(parameters, columns.chunk(len(parameters)), strict=True):
                self.add_sum(parameter, task, part)
        elif self._mark_all_written(parameters, task):
            torch.sum(columns, 1, out=rows[task])
        else:
            rows[task] += columns.sum(1)

    def adjacent(self, parameters: Sequence[nn.Parameter]) -> Tensor | None:
        """Return the columns of k parameters of one shape in J, [T, k * shape[0], *shape[1:]].

        The result is a view of `buffer`; None if these columns are not adjacent.
        """
        key = tuple(map(id, parameters))
        if key not in self._adjacent:
            spans = [self._spans[i] for i in key]
            follow = all(before.stop == span.start for before, span in pairwise(spans))
            columns = self.buffer[:, spans[0].start : spans[-1].stop] if follow else None
            self._adjacent[key] = None if columns is None else columns.unflatten(1, (-1, *parameters[0].shape[1:]))
        return self._adjacent[key]

    def add_rows(self, parameter: nn.Parameter, task: int, ids: Tensor, rows: Tensor) -> None:
        """Add one task's gradient of a table [V, d]: rows [n, d] summed over equal ids [n], in
        float32.
        """
        row = self._rows[id(parameter)][task]
        if self.buffer.dtype == torch.float32 and task not in self._written[id(parameter)]:
            self._mark_written(parameter, task)
            row.zero_().index_add_(0, ids, cast(rows, torch.float32))
        else:
            zeros = torch.zeros(row.shape, device=row.device)
            self.add_task(parameter, task, zeros.index_add_(0, ids, cast(rows, torch.float32)))

    def columns_of(self, parameter: nn.Parameter) -> Tensor:
        """Return the parameter's part of `buffer`, [T, *shape], for a write after `reserve`."""
        return self._columns[id(parameter)]

    def is_unwritten(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Return True if no gradient of these parameters was written since `clear`."""
        return not any(self._written[id(parameter)] for parameter in parameters)

    def reserve(self, parameters: Sequence[nn.Parameter], tasks: Sequence[int]) -> bool:
        """Announce one write by the caller into `columns_of` each of these parameters.

        Returns True if the caller must overwrite the columns, False if it must add to them. tasks:
        the tasks that have a gradient in this write. In the rows of the other tasks, the caller may
        store any numbers when it overwrites, and must add 0 when it adds.
        """
        first = self.is_unwritten(parameters)
        for key in map(id, parameters):
            found = self._written[key]
            self.reached.add(key)
            for task in tasks:
                if task not in found and not first:
                    self._rows[key][task].zero_()
                found.add(task)
        return first

    def complete(self) -> Tensor:
        """Return J [T, P], with zeros where no gradient was written."""
        tasks = range(len(self.buffer))
        for task in tasks:
            if not any(task in written for written in self._written.values()):
                self.buffer[task].zero_()
                for written in self._written.values():
                    written.add(task)
        for key in self._rows:
            self._fill(key)
        return self.buffer

    def spans(self) -> Mapping[int, slice]:
        """Return the columns of every parameter by id."""
        return self._spans

    def columns(self, piece: slice) -> Tensor:
        """Return columns `piece` of J, [T, columns], with zeros where no gradient was written.

        The caller sends them to other ranks, so no gradient may be written there until `clear`.
        """
        for key, span in self._spans.items():
            if span.start < piece.stop and span.stop > piece.start:
                self._fill(key)
        return self.buffer[:, piece]

    def rows(self) -> dict[int, list[Tensor]]:
        """Return the T gradients of every parameter by id, views of J."""
        self.complete()
        return dict(self._rows)

    def of(self, parameter: nn.Parameter) -> Tensor:
        """Return the parameter's columns of J, [T, *shape]."""
        self._fill(id(parameter))
        return self._columns[id(parameter)]

    def of_task(self, parameter: nn.Parameter, task: int) -> Tensor | None:
        """Return one task's gradient, a view of J; None if none was written since `clear`."""
        return self._rows[id(parameter)][task] if task in self._written[id(parameter)] else None

    def merge(self, weights: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Return sum_t weights[t] J[t], [P] of `dtype`, summed in float32.

        dtype: float32 or `narrow`. out: the tensor to write into.
        """
        if dtype in (torch.float32, self.buffer.dtype):
            out = torch.empty(self.buffer.shape[1], dtype=dtype, device=self.buffer.device) if out is None else out
            combine(self.buffer, weights, out=out)
            return out
        merged = self.merge(weights, torch.float32)
        return merged.to(dtype) if out is None else out.copy_(merged)

    def split(self, merged: Tensor) -> Merged:
        """Return a merged gradient [P] as the parameters' parts by id.

        merged: contiguous and at offset 0 of its storage.
        """
        return Merged(merged, {key: rows[0] for key, rows in self._rows.items()})

    def _mark_written(self, parameter: nn.Parameter, task: int) -> bool:
        """Mark a task's gradient as written; return True if this is the first write."""
        written = self._written[id(parameter)]
        self.reached.add(id(parameter))
        if task in written:
            return False
        written.add(task)
        return True

    def _mark_all_written(self, parameters: Sequence[nn.Parameter], task: int) -> bool:
        """Mark a task's gradients of all parameters as written; return True if none was before.

        If some were, the others are zeroed, so that the caller can add to all.
        """
        first = [parameter for parameter in parameters if self._mark_written(parameter, task)]
        if len(first) < len(parameters):
            for parameter in first:
                self._rows[id(parameter)][task].zero_()
        return len(first) == len(parameters)

    def _fill(self, key: int) -> None:
        rows, written = self._rows[key], self._written[key]
        for task, row in enumerate(rows):
            if task not in written:
                row.zero_()
                written.add(task)
