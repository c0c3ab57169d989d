"""J of the dense shared parameters, one buffer that the layers' backward writes into."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from fastmtl.surgery.merged import Merged
from fastmtl_kernels import combine
from fastmtl_kernels.cast import cast


class Jacobian:
    """T task gradients of `parameters`, P numbers together, as `buffer` [T, P] of `dtype`.

    What was never written since `clear` is zero. The first write after it stores instead of adding: clearing touches
    no memory, and the first micro-batch does not read what it replaces.

    reached: ids of the parameters of which something was written since `clear`, be it zeros. narrow: the dtype of the
    parameters where all have one of 16 bits, else float32.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], num_tasks: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._parameters = list(parameters)
        sizes = [parameter.numel() for parameter in self._parameters]
        self.buffer = torch.empty(num_tasks, sum(sizes), dtype=dtype, device=device)
        self._columns = {
            id(parameter): columns.unflatten(1, parameter.shape)
            for parameter, columns in zip(self._parameters, self.buffer.split(sizes, dim=1), strict=True)
        }
        self._rows = {key: list(columns.unbind()) for key, columns in self._columns.items()}
        ends = list(accumulate(sizes, initial=0))
        self._spans = {key: slice(*span) for key, span in zip(self._columns, pairwise(ends), strict=True)}
        dtypes = {parameter.dtype for parameter in self._parameters}
        self.narrow = dtypes.pop() if dtypes in ({torch.bfloat16}, {torch.float16}) else torch.float32
        self._beside: dict[tuple[int, ...], Tensor | None] = {}
        self._written: dict[int, set[int]] = {}
        self.reached: set[int] = set()
        self.clear()

    def clear(self) -> None:
        self.reached.clear()
        self._written = {id(parameter): set() for parameter in self._parameters}

    def add(self, parameter: nn.Parameter, gradients: Tensor) -> None:
        """All tasks' gradients [T, *shape]."""
        columns, written = self._columns[id(parameter)], self._written[id(parameter)]
        self.reached.add(id(parameter))
        if not written:
            columns.copy_(gradients)
        else:
            self._fill(id(parameter))
            columns += gradients
        written.update(range(len(columns)))

    def add_task(self, parameter: nn.Parameter, task: int, gradient: Tensor) -> None:
        """One task's gradient, of the parameter's shape."""
        row = self._rows[id(parameter)][task]
        if self._is_first(parameter, task):
            row.copy_(gradient)
        else:
            row += gradient

    def add_product(self, parameter: nn.Parameter, task: int, left: Tensor, right: Tensor) -> None:
        """One task's gradient as left [out, n] times right [n, in], both of J's dtype; made where it belongs."""
        row = self._rows[id(parameter)][task]
        if self._is_first(parameter, task):
            torch.mm(left, right, out=row)
        else:
            row.addmm_(left, right)

    def add_sum(self, parameter: nn.Parameter, task: int, columns: Tensor) -> None:
        """One task's gradient as the sum of columns [d, n] of J's dtype; made where it belongs."""
        row = self._rows[id(parameter)][task]
        if self._is_first(parameter, task):
            torch.sum(columns, 1, out=row)
        else:
            row += columns.sum(1)

    def add_products(self, parameters: Sequence[nn.Parameter], task: int, left: Tensor, right: Tensor) -> None:
        """As `add_product` of k weights of one shape, whose parts of left [k out, n] are one under the other: one
        product where the weights' columns follow one another.
        """
        rows = self.beside(parameters)
        if rows is None:
            for parameter, part in zip(parameters, left.chunk(len(parameters)), strict=True):
                self.add_product(parameter, task, part, right)
        elif self._are_first(parameters, task):
            torch.mm(left, right, out=rows[task])
        else:
            rows[task].addmm_(left, right)

    def add_sums(self, parameters: Sequence[nn.Parameter], task: int, columns: Tensor) -> None:
        """As `add_sum` of k biases, with columns [k d, n], in the same way."""
        rows = self.beside(parameters)
        if rows is None:
            for parameter, part in zip(parameters, columns.chunk(len(parameters)), strict=True):
                self.add_sum(parameter, task, part)
        elif self._are_first(parameters, task):
            torch.sum(columns, 1, out=rows[task])
        else:
            rows[task] += columns.sum(1)

    def beside(self, parameters: Sequence[nn.Parameter]) -> Tensor | None:
        """[T, k times the first dimension, *rest], the part of `buffer` that belongs to k parameters of one shape; None
        where their columns do not follow one another.
        """
        key = tuple(map(id, parameters))
        if key not in self._beside:
            spans = [self._spans[each] for each in key]
            follow = all(before.stop == span.start for before, span in pairwise(spans))
            columns = self.buffer[:, spans[0].start : spans[-1].stop] if follow else None
            self._beside[key] = None if columns is None else columns.unflatten(1, (-1, *parameters[0].shape[1:]))
        return self._beside[key]

    def add_rows(self, parameter: nn.Parameter, task: int, ids: Tensor, rows: Tensor) -> None:
        """One task's gradient of a table [V, d] as the sums of rows [n, d] over equal ids [n], in float32."""
        row = self._rows[id(parameter)][task]
        if self.buffer.dtype == torch.float32 and task not in self._written[id(parameter)]:
            self._is_first(parameter, task)
            row.zero_().index_add_(0, ids, cast(rows, torch.float32))
        else:
            zeros = torch.zeros(row.shape, device=row.device)
            self.add_task(parameter, task, zeros.index_add_(0, ids, cast(rows, torch.float32)))

    def columns_of(self, parameter: nn.Parameter) -> Tensor:
        """[T, *shape], the parameter's part of `buffer`, for whoever writes there by `take`."""
        return self._columns[id(parameter)]

    def is_new(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Whether nothing has been written of these."""
        return not any(self._written[id(parameter)] for parameter in parameters)

    def take(self, parameters: Sequence[nn.Parameter], tasks: Sequence[int]) -> bool:
        """Before a write of all these parameters' gradients into `columns_of`: whether it has to store them, else to
        add. tasks: those whose gradients it makes; the others' are left undefined by storing, as they are by adding 0.
        """
        first = self.is_new(parameters)
        for key in map(id, parameters):
            found = self._written[key]
            self.reached.add(key)
            for task in tasks:
                if task not in found and not first:
                    self._rows[key][task].zero_()
                found.add(task)
        return first

    def complete(self) -> Tensor:
        """J [T, P]."""
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
        """The columns of every parameter, by its id."""
        return self._spans

    def columns(self, piece: slice) -> Tensor:
        """[T, columns of the piece] of J, where nothing else will be written in it."""
        for key, span in self._spans.items():
            if span.start < piece.stop and span.stop > piece.start:
                self._fill(key)
        return self.buffer[:, piece]

    def rows(self) -> dict[int, list[Tensor]]:
        """The T gradients of every parameter, views of J, by its id."""
        self.complete()
        return dict(self._rows)

    def of(self, parameter: nn.Parameter) -> Tensor:
        """The parameter's columns of J, [T, *shape]."""
        self._fill(id(parameter))
        return self._columns[id(parameter)]

    def merge(self, weights: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """sum_t weights[t] J[t], [P] of `dtype`, float32 or `narrow`, added up in float32. out: where to."""
        if dtype in (torch.float32, self.buffer.dtype):
            out = torch.empty(self.buffer.shape[1], dtype=dtype, device=self.buffer.device) if out is None else out
            combine(self.buffer, weights, out=out)
            return out
        merged = self.merge(weights, torch.float32)
        return merged.to(dtype) if out is None else out.copy_(merged)

    def split(self, merged: Tensor) -> Merged:
        """[P], contiguous and the first of its storage -> the parameters' parts by id."""
        return Merged(merged, {key: rows[0] for key, rows in self._rows.items()})

    def _is_first(self, parameter: nn.Parameter, task: int) -> bool:
        written = self._written[id(parameter)]
        self.reached.add(id(parameter))
        if task in written:
            return False
        written.add(task)
        return True

    def _are_first(self, parameters: Sequence[nn.Parameter], task: int) -> bool:
        """Whether all are to be stored. Where only some are, these are zeros to add to."""
        first = [parameter for parameter in parameters if self._is_first(parameter, task)]
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
