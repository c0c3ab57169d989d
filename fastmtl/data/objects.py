"""Rows that a Python program passes to `fastmtl.train`: data sets, data frames and lists."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fastmtl.config import FROM_PYTHON
from fastmtl.data.columnar import BATCH
from fastmtl.data.huggingface import as_table
from fastmtl.data.places import Batch, Table
from fastmtl.errors import UserError, unknown_name

# {task: {"train" or "dev": rows}}, as the user passes it; "validation" is another name of "dev".
Objects = Mapping[str, Mapping[str, Any]]
_SPLITS = {"train": "train", "dev": "dev", "validation": "dev"}
_KINDS = "a datasets.Dataset, a pandas.DataFrame or a list of dictionaries"


def tables(data: Objects, tasks: Sequence[str]) -> dict[tuple[str, str], Table]:
    """Return the table of each (task, "train" or "dev") in `data`.

    tasks: those of the recipe. Raises UserError for an unknown task or split, and for rows of
    another type.
    """
    if not isinstance(data, Mapping):
        raise UserError(f"data: expected {{task: {{split: rows}}}}, found {type(data).__name__}")
    found: dict[tuple[str, str], Table] = {}
    for task, splits in data.items():
        if task not in tasks:
            raise UserError(f"data: {unknown_name('task', str(task), tasks)}")
        if not isinstance(splits, Mapping):
            raise UserError(f"data[{task!r}]: expected {{'train': rows, 'dev': rows}}, found {type(splits).__name__}")
        for name, rows in splits.items():
            if name not in _SPLITS:
                raise UserError(f"data[{task!r}]: {unknown_name('split', str(name), _SPLITS)}")
            if (task, _SPLITS[name]) in found:
                raise UserError(f"data[{task!r}]: 'dev' and 'validation' are the same split: leave out one of both")
            found[task, _SPLITS[name]] = _table(rows, f"data[{task!r}][{name!r}]")
    return found


def marked(values: dict[str, Any], found: Mapping[tuple[str, str], Table]) -> dict[str, Any]:
    """Return a recipe's values in which the splits of `found` are marked as rows from Python."""
    tasks = {name: {**task, "data": {**task.get("data", {})}} for name, task in values.get("tasks", {}).items()}
    for task, split in found:
        tasks[task]["data"][split] = FROM_PYTHON
    return {**values, "tasks": tasks}


def _table(rows: Any, name: str) -> Table:
    if _is(rows, "datasets", "Dataset"):
        return as_table(rows, name)
    if _is(rows, "pandas", "DataFrame"):
        header = [str(column) for column in rows.columns]
        return _checked(Table(name, header, lambda: _frame(rows, header)), len(rows))
    if isinstance(rows, Sequence) and all(isinstance(row, Mapping) for row in rows):
        header = list(dict.fromkeys(str(column) for row in rows for column in row))
        return _checked(Table(name, header, lambda: _rows(rows)), len(rows))
    raise UserError(f"{name}: expected {_KINDS}, found {_kind(rows)}")


def _is(rows: Any, module: str, name: str) -> bool:
    """Return whether `rows` is an object of a class in a package that the caller may lack."""
    found = getattr(sys.modules.get(module), name, None)
    return found is not None and isinstance(rows, found)


def _kind(rows: Any) -> str:
    if not isinstance(rows, Sequence) or isinstance(rows, str | bytes):
        return type(rows).__name__
    other = next(row for row in rows if not isinstance(row, Mapping))
    return f"{type(rows).__name__} with {type(other).__name__}"


def _checked(table: Table, rows: int) -> Table:
    if not rows or not table.header:
        raise UserError(f"{table.name}: no rows")
    return table


def _frame(frame: Any, header: list[str]) -> Iterator[Batch]:
    for start in range(0, len(frame), BATCH):
        part = frame.iloc[start : start + BATCH]
        cells = part.astype(object).where(part.notna(), None)
        yield [dict(zip(header, map(_plain, row), strict=True)) for row in cells.itertuples(index=False, name=None)]


def _rows(rows: Sequence[Mapping[Any, object]]) -> Iterator[Batch]:
    for start in range(0, len(rows), BATCH):
        yield [{str(key): _plain(cell) for key, cell in row.items()} for row in rows[start : start + BATCH]]


def _plain(cell: object) -> object:
    """Return a cell with NumPy's numbers and arrays as those of Python."""
    return cell.tolist() if isinstance(cell, np.generic | np.ndarray) else cell
