"""The tasks of each row, from the forms in which a user gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastmtl.errors import UserError, quoted, unknown_name

# Numbers of a row's tasks: () for a row of no task, several where several losses use the row.
RowTasks = tuple[int, ...]

_EXPECTED = (
    "give the task of each row (int64 [B] or names), {task: number of rows} in the order of the rows, or for rows of "
    "several tasks tuples of names in their place, or bool [B, number of tasks]"
)


def read_rows(given: Any, tasks: list[str]) -> list[RowTasks]:
    """Return the tasks of each row.

    given: int64 [B] with numbers of tasks, where -1 is no task; bool [B, T]; names of tasks or
    tuples of names, one per row; or {task or tuple: number of rows}, in the order of the rows. A
    tensor on the host causes no wait for the device.
    Raises UserError for anything else, and for unknown tasks.
    """
    if isinstance(given, Mapping):
        return [row for key, rows in given.items() for row in [_row(key, tasks)] * _count(key, rows)]
    if is_table(given):
        if given.shape[1] != len(tasks):
            raise UserError(f"rows: a tensor of shape {tuple(given.shape)} for {len(tasks)} tasks: {_EXPECTED}")
        return [tuple(task for task, uses in enumerate(row) if uses) for row in given.tolist()]
    if hasattr(given, "tolist"):
        if getattr(given, "ndim", 1) != 1 or "int" not in str(given.dtype):
            raise UserError(f"rows: a tensor of shape {tuple(given.shape)} and {given.dtype}: {_EXPECTED}")
        given = given.tolist()
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise UserError(f"rows is of type {type(given).__name__}: {_EXPECTED}")
    return [_row(entry, tasks) for entry in given]


def is_table(given: Any) -> bool:
    """Return True for bool [B, T], the form in which any row may have several tasks."""
    return getattr(given, "ndim", 0) == 2 and "bool" in str(getattr(given, "dtype", ""))


def _row(entry: Any, tasks: list[str]) -> RowTasks:
    found = {_number(task, tasks) for task in (entry if isinstance(entry, tuple) else (entry,))}
    return tuple(sorted(found - {-1}))


def _number(task: Any, tasks: list[str]) -> int:
    if isinstance(task, str):
        if task not in tasks:
            raise unknown_name("task in rows", task, tasks)
        return tasks.index(task)
    if isinstance(task, bool) or not isinstance(task, int):
        raise UserError(f"rows: {quoted(task)} is no task: {_EXPECTED}")
    if not -1 <= task < len(tasks):
        raise UserError(f"rows: there is no task {task}: use 0 to {len(tasks) - 1} as in `tasks`, -1 for a row of none")
    return task


def _count(name: Any, rows: Any) -> int:
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 0:
        raise UserError(f"rows: task {quoted(name)} has {quoted(rows)} rows: give an integer that is not negative")
    return rows
