"""The task of each row of a batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from fastmtl.errors import UserError
from fastmtl.surgery.segments import Segments
from fastmtl_kernels.upload import upload

FindParameter = Callable[[nn.Module, str], nn.Parameter | None]


class RowMap:
    """The tasks of the B rows of a batch, and of the B * k rows of tensors inside a model.

    Row b of the batch has the rows b * k to (b + 1) * k of such a tensor. `batch` is B. Rows of no
    task have the number -1; no loss may depend on them.

    tasks: a number from -1 to num_tasks - 1 for each row. device: of the model. parameter: the
    sink's parameter for a module and a name (see rules/rule.py).
    """

    def __init__(
        self, tasks: Sequence[int], num_tasks: int, device: torch.device, parameter: FindParameter = getattr
    ) -> None:
        self.batch, self.num_tasks, self.device, self.parameter = len(tasks), num_tasks, device, parameter
        rows_of = Counter(tasks)
        self.sizes = [rows_of[task] for task in range(num_tasks)]
        last = [task if task >= 0 else num_tasks for task in tasks]
        order = sorted(range(self.batch), key=last.__getitem__)
        self._order: Tensor | None = None
        self._places: Tensor | None = None  # of the batch's rows in the order of the tasks
        if order != list(range(self.batch)):
            host = torch.tensor(order)
            self._order, self._places = upload(host, device), upload(host.argsort(), device)
        self._segments: dict[int, Segments] = {}
        self._only: dict[tuple[int, bool], OneTask] = {}
        self._tasks = last
        self._group_of_row: Tensor | None = None

    def fits(self, rows: int) -> bool:
        """Return True if a tensor with so many rows has equally many for each row of the batch."""
        return rows % self.batch == 0 if self.batch else rows == 0

    def check_inputs(self, tensors: Sequence[Tensor]) -> None:
        """Raise UserError if no input of the trunk has the rows of the map in its first dimension.

        tensors: the inputs that have a dimension.
        """
        if not tensors or any(len(x) == self.batch for x in tensors):
            return
        shapes = ", ".join(str(tuple(x.shape)) for x in tensors)
        if all(len(x) == 1 for x in tensors):
            raise UserError(
                f"rows: the model gets inputs of shapes {shapes}, one packed row for {self.batch} rows: give it padded "
                "rows [B, length]; packed batches need fastmtl's own encoder"
            )
        raise UserError(
            f"rows: the model gets inputs of shapes {shapes}, but `rows` has {self.batch} rows: the first dimension "
            "must be the rows of the batch"
        )

    def has_rows(self, task: int) -> bool:
        """Return True if a row belongs to the task."""
        return self.sizes[task] > 0

    def task_of(self, part: int) -> int:
        """Return the task that a part of `split` belongs to, -1 for none."""
        return part

    def segments(self, rows: int) -> Segments:
        """Return the tasks' segments of a tensor with `rows` = B * k rows."""
        k = rows // self.batch if self.batch else 0
        if k not in self._segments:
            host = tuple(accumulate((size * k for size in self.sizes), initial=0))
            offsets = upload(torch.tensor(host, dtype=torch.int32), self.device)
            self._segments[k] = Segments(offsets, host, self._order)
        return self._segments[k]

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return T parts of x [B * k, ...], the rows of each task.

        Rows of no task are in the last part: nothing depends on them, but a model computes them.
        The part of a task without rows is the first row of another, since a module may not support
        empty inputs; `join` drops its results. Without `order` the parts are views.
        """
        k = len(x) // self.batch if self.batch else 0
        if self._order is not None:
            x = x.unflatten(0, (self.batch, k)).index_select(0, self._order).flatten(0, 1)
        parts = x.split([size * k for size in self.groups])
        return tuple(part if size else x[:k] for part, size in zip(parts, self.groups, strict=True))

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the T parts of `split`, or results of the same rows, in the batch's order."""
        joined = torch.cat([part if size else part[:0] for part, size in zip(parts, self.groups, strict=True)])
        if self._places is None:
            return joined
        return joined.unflatten(0, (self.batch, len(joined) // self.batch)).index_select(0, self._places).flatten(0, 1)

    def spread(self, parts: Sequence[Tensor]) -> Tensor:
        """Return [B, ...], the part of each row's task. parts: T tensors [1, ...]."""
        if self._group_of_row is None:
            groups = torch.tensor([min(task, len(self.sizes) - 1) for task in self._tasks], dtype=torch.int64)
            self._group_of_row = upload(groups, self.device)
        return torch.cat(list(parts)).index_select(0, self._group_of_row)

    @property
    def groups(self) -> list[int]:
        """Numbers of rows of the T parts of `split`."""
        return [*self.sizes[:-1], self.batch - sum(self.sizes[:-1])]

    def only(self, task: int, *, aliased: bool) -> OneTask:
        """Return the map inside a run of one task's rows."""
        if (task, aliased) not in self._only:
            self._only[task, aliased] = self._inside(task, aliased=aliased)
        return self._only[task, aliased]

    def _inside(self, task: int, *, aliased: bool) -> OneTask:
        return OneTask(task, self, aliased=aliased)


class OneTask:
    """The map inside a run of one task: every row of every tensor belongs to that task.

    every: the map of all tasks, outside the run. aliased: every module inside uses aliases of its
    parameters, and no other rule.
    """

    batch = 1

    def __init__(self, task: int, every: RowMap, *, aliased: bool) -> None:
        self.task, self.every, self.aliased = task, every, aliased
        self.parameter = every.parameter
        self._segments: dict[tuple[int, int], Segments] = {}

    def fits(self, rows: int) -> bool:
        return True

    def task_of(self, part: int) -> int:
        """Return the task of the rows, which are part number `part` of the batch; -1 for none."""
        return self.every.task_of(part)

    def segments(self, rows: int) -> Segments:
        return self.segments_of(self.task, rows)

    def segments_of(self, task: int, rows: int) -> Segments:
        """Return the segments in which all `rows` belong to a task, or to none if it is -1."""
        if (task, rows) not in self._segments:
            end = rows if task >= 0 else 0
            host = (0,) * (task + 1) + (end,) * (self.every.num_tasks - task)
            offsets = upload(torch.tensor(host, dtype=torch.int32), self.every.device)
            self._segments[task, rows] = Segments(offsets, host)
        return self._segments[task, rows]
