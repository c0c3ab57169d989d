"""J of the dense shared parameters, one buffer that the layers' backward writes into."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Jacobian:
    """T task gradients of `parameters`, P numbers together, as `buffer` [T, P] of `dtype`.

    What was never written since `clear` is zero. The first write after it stores instead of adding: clearing touches
    no memory, and the first micro-batch does not read what it replaces.
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
        self._written: dict[int, set[int]] = {}
        self.clear()

    def clear(self) -> None:
        self._written = {id(parameter): set() for parameter in self._parameters}

    def add(self, parameter: nn.Parameter, gradients: Tensor) -> None:
        """All tasks' gradients [T, *shape]."""
        columns, written = self._columns[id(parameter)], self._written[id(parameter)]
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

    def of(self, parameter: nn.Parameter) -> Tensor:
        """The parameter's columns of J, [T, *shape]."""
        self._fill(id(parameter))
        return self._columns[id(parameter)]

    def split(self, merged: Tensor) -> dict[int, Tensor]:
        """[P] -> a tensor of its shape for each parameter, by id."""
        parts = merged.split([parameter.numel() for parameter in self._parameters])
        return {id(p): part.view(p.shape) for p, part in zip(self._parameters, parts, strict=True)}

    def _is_first(self, parameter: nn.Parameter, task: int) -> bool:
        written = self._written[id(parameter)]
        if task in written:
            return False
        written.add(task)
        return True

    def _fill(self, key: int) -> None:
        rows, written = self._rows[key], self._written[key]
        for task, row in enumerate(rows):
            if task not in written:
                row.zero_()
                written.add(task)
