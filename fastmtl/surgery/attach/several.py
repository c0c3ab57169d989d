"""Rows of several tasks: one forward, and a backward for each set of tasks without common rows.

In a pass, each row belongs to at most one task. A layer's node keeps segments that change from pass
to pass, so that one graph serves all of them. The general rule runs a module once for each distinct
set of tasks that a row has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from fastmtl.surgery.attach.reading import RowTasks
from fastmtl.surgery.attach.row_map import FindParameter, OneTask, RowMap
from fastmtl.surgery.segments import Segments


class PassSegments(Segments):
    """Segments of the pass that runs now, as `find` returns them."""

    def __init__(self, find: Callable[[], Segments]) -> None:
        self._find = find

    @property
    def offsets(self) -> Tensor:
        return self._find().offsets

    @property
    def host(self) -> tuple[int, ...]:
        return self._find().host

    @property
    def order(self) -> Tensor | None:
        return self._find().order

    def fixed(self) -> Segments:
        return self._find()

    def sort(self, rows: Tensor) -> Tensor:
        return self._find().sort(rows)


class OneSet(OneTask):
    """The map inside a run of the rows of one set of tasks; `task` is the number of the set."""

    def __init__(self, task: int, every: RowMap, *, aliased: bool) -> None:
        super().__init__(task, every, aliased=aliased)
        self._of_passes: dict[int, PassSegments] = {}

    def segments(self, rows: int) -> Segments:
        if rows not in self._of_passes:
            self._of_passes[rows] = PassSegments(lambda: self.segments_of(self.task_of(self.task), rows))
        return self._of_passes[rows]


class SeveralTasks(RowMap):
    """The tasks of the B rows of a batch, any number for each row.

    tasks: of each row. sets: every set of tasks that a row has, and further ones for modules that
    must run equally often on each rank. Other arguments: see RowMap, whose parts and groups are
    here those of the sets. Before `enter`, no row belongs to a task.
    """

    def __init__(
        self,
        tasks: Sequence[RowTasks],
        sets: Sequence[RowTasks],
        num_tasks: int,
        device: torch.device,
        parameter: FindParameter = getattr,
    ) -> None:
        numbers = {row: number for number, row in enumerate(sets)}
        super().__init__([numbers[row] for row in tasks], len(sets), device, parameter)
        self._rows, self.sets, self.num_tasks = tasks, sets, num_tasks
        self._now: tuple[int, ...] = ()
        self._passes: dict[tuple[int, ...], RowMap] = {}
        self._of_passes: dict[int, PassSegments] = {}

    def enter(self, tasks: Iterable[int]) -> None:
        self._now = tuple(tasks)

    def has_rows(self, task: int) -> bool:
        return any(task in row for row in self._rows)

    def task_of(self, part: int) -> int:
        return next((task for task in self.sets[part] if task in self._now), -1)

    def segments(self, rows: int) -> Segments:
        if rows not in self._of_passes:
            self._of_passes[rows] = PassSegments(lambda: self._of_pass().segments(rows))
        return self._of_passes[rows]

    def _inside(self, task: int, *, aliased: bool) -> OneTask:
        return OneSet(task, self, aliased=aliased)

    def _of_pass(self) -> RowMap:
        if self._now not in self._passes:
            owners = {row: self.task_of(number) for number, row in enumerate(self.sets)}
            self._passes[self._now] = RowMap([owners[row] for row in self._rows], self.num_tasks, self.device)
        return self._passes[self._now]


def passes_of(sets: Iterable[RowTasks], num_tasks: int) -> list[list[int]]:
    """Divide the tasks into passes, so that no two tasks of a pass have a row in common.

    This is a greedy colouring of the graph of the pairs of tasks with common rows.
    """
    together = {(a, b) for row in sets for a in row for b in row if a != b}
    passes: list[list[int]] = []
    for task in range(num_tasks):
        for found in passes:
            if not any((task, other) in together for other in found):
                found.append(task)
                break
        else:
            passes.append([task])
    return passes
