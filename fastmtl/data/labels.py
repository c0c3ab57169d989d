"""Conversion of a label cell to a class id or a number, the same for CSV, JSON and Parquet."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal

from fastmtl.config import TaskConfig
from fastmtl.data.formats import Layout
from fastmtl.data.records import BadRow, Record
from fastmtl.errors import listed, quoted
from fastmtl.files.label_text import as_label, as_number

# Supported types of cells in JSON and Parquet. Binary data, lists, objects and dates are not
# supported, since each can be written as text in several ways.
CELLS = (str, int, float, Decimal)


class BadCell(Exception):
    """Raised for an unusable cell. reason: a text with the expected and the found value.

    missing: True for the cell of a label that is empty or null.
    """

    def __init__(self, column: str | int, reason: str, *, missing: bool = False) -> None:
        super().__init__(reason)
        self.column, self.reason, self.missing = column, reason, missing

    def row(self, line: int | str) -> BadRow:
        """Return the cell's row; line: as in BadRow."""
        return BadRow(line, str(self.column), self.reason, self.missing)


class Labels:
    """Conversion of the label cells of one file.

    Regression: a cell is a number within the task's range. Classification and binary tasks: a cell
    is a class name or a class id from 0. The names are the task's `label_names` or those of the
    layout. Ids are not accepted if a name is itself a number or a boolean, since a cell could then
    mean two classes. With two classes, true is class 1 and false is class 0.
    """

    shape: tuple[int, ...] = ()  # of a row's labels

    def __init__(self, task: TaskConfig, layout: Layout) -> None:
        self._column = layout.label
        self._range = task.range if task.type == "regression" else None
        self._classes = 2 if task.type == "binary" else task.num_labels or 0
        names = {name: index for index, name in enumerate(task.label_names)} if task.label_names else layout.labels
        self._shown = names
        self._names = {as_label(name): index for name, index in names.items()}
        by_name_only = any(as_number(name) is not None or name in ("true", "false") for name in self._names)
        ids = {} if by_name_only else {str(index): index for index in range(self._classes)}
        if ids and self._classes == 2 and task.type != "multilabel":
            ids |= {"false": 0, "true": 1}
        self._ids = {**ids, **self._names}

    def read(self, record: Record) -> float | int:
        """Return a row's class id, or its number if the task is regression.

        Raises BadCell for a cell that is neither.
        """
        value = record.cells.get(self._column)
        found = self.find(value)
        if found is None:
            shown = quoted(str(value)) if as_label(value) else "nothing"
            raise BadCell(self._column, f"expected {self._expected()}, found {shown}", missing=not as_label(value))
        return found

    def can_read(self, values: Sequence[object]) -> bool:
        """Return whether the only one of `values`, the content of a cell, is a valid label."""
        return self.find(values[0]) is not None

    def find(self, value: object) -> float | int | None:
        """Return the class id or number of a cell's content, None if it is none."""
        if value is not None and not isinstance(value, CELLS):
            return None
        label = as_label(value)
        if self._range is None:
            return self._ids.get(label)
        low, high = self._range
        number = as_number(label)
        return number if number is not None and low <= number <= high else None

    def _expected(self) -> str:
        if self._range is not None:
            low, high = self._range
            return f"a number from {low:g} to {high:g}"
        return f"one of {listed(self._shown, 12)}" if self._shown else f"a class from 0 to {self._classes - 1}"
