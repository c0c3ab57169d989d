"""Conversion of label cells to a set of labels, for tasks of type multilabel."""

from __future__ import annotations

from collections.abc import Sequence

from fastmtl.config import TaskConfig
from fastmtl.data.formats import Layout
from fastmtl.data.labels import CELLS, BadCell, Labels
from fastmtl.data.records import Record
from fastmtl.errors import listed, quoted
from fastmtl.files.label_text import as_label

_INDICATORS = {"0": 0.0, "1": 1.0, "false": 0.0, "true": 1.0}


class LabelSets:
    """Conversion of the label cells of one file to a row of numbers, 0 or 1 for each label.

    One column: a cell is a text of labels with `multilabel.separator` between them, or a list of
    labels in JSON and Parquet. A label is a name or its number from 0, by the rules of `Labels`. An
    empty text or list is the empty set, a null a missing label.
    Indicator columns: one column for each label, with cells 0, 1, true or false. A row in which all
    of them are empty has a missing label.
    """

    def __init__(self, task: TaskConfig, layout: Layout) -> None:
        self._columns, self._indicates = layout.label_columns, bool(layout.indicators)
        self._separator = task.multilabel.separator
        self._labels, self._names = Labels(task, layout), task.label_names or []
        self.shape = (len(self._names),)

    def read(self, record: Record) -> list[float]:
        """Return a row's labels, 0 or 1 each; raise BadCell for cells that are no set of labels."""
        return self._read([record.cells.get(column) for column in self._columns])

    def can_read(self, values: Sequence[object]) -> bool:
        """Return whether `values`, the contents of the label columns, are a valid set of labels."""
        try:
            self._read(values)
        except BadCell:
            return False
        return True

    def _read(self, values: Sequence[object]) -> list[float]:
        if self._indicates:
            missing = not any(as_label(value) for value in values)
            cells = zip(self._columns, values, strict=True)
            return [_indicated(column, value, missing=missing) for column, value in cells]
        (value,) = values
        if isinstance(value, str):
            return self._listed(value.split(self._separator) if value.strip() else [])
        if not as_label(value):
            reason = "expected labels, found nothing (a row without labels has an empty list)"
            raise BadCell(self._columns[0], reason, missing=True)
        return self._listed(value if isinstance(value, list) else [value])

    def _listed(self, items: Sequence[object]) -> list[float]:
        (column,) = self._columns
        row = [0.0] * len(self._names)
        for item in items:
            index = self._labels.find(item)
            if index is None:
                shown = quoted(str(item)) if as_label(item) else "an empty label"
                raise BadCell(column, f"expected one of {listed(self._names, 12)}, found {shown}")
            if row[int(index)]:
                raise BadCell(column, f"the label {quoted(self._names[int(index)])} occurs twice")
            row[int(index)] = 1.0
        return row


def _indicated(column: str | int, value: object, *, missing: bool) -> float:
    text = as_label(value) if value is None or isinstance(value, CELLS) else str(value)
    if text not in _INDICATORS:
        shown = quoted(text) if text else "nothing"
        raise BadCell(column, f"expected 0, 1, true or false, found {shown}", missing=missing)
    return _INDICATORS[text]


def label_reader(task: TaskConfig, layout: Layout) -> Labels | LabelSets:
    """Return the conversion of the label cells of one file, by the task's type."""
    return LabelSets(task, layout) if task.type == "multilabel" else Labels(task, layout)
