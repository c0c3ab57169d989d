"""The places of a task's rows: files, and tables such as data sets of Hugging Face."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# Some rows of a table: the cells of each by the name of the column.
Batch = Sequence[Mapping[str | int, object]]


@dataclass(frozen=True)
class Table:
    """Rows with named columns: a Parquet or Arrow file, a saved data set, or an object from Python.

    name: the name in messages. header: names of the columns. batches: a function that yields all
    rows in order, some at a time. classes: the names of the classes of columns that have them.
    """

    name: str
    header: list[str]
    batches: Callable[[], Iterator[Batch]]
    classes: Mapping[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


# The rows of a split are in one place or in several.
Place = Path | Table
