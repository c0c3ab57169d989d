"""Checks that a file's header and quotes agree with the recipe."""

from __future__ import annotations

import re
from collections.abc import Iterable

from fastmtl.config import FileConfig, TaskConfig
from fastmtl.data.formats import Layout, has_header, is_quoted
from fastmtl.data.label_sets import label_reader
from fastmtl.data.places import Place
from fastmtl.data.records import Record, Source
from fastmtl.errors import UserError, listed, quoted, shortened

_CSV_QUOTED = re.compile(r'"(?:[^"]|"")*"')


def uses_quotes(files: FileConfig, delimiter: str) -> bool:
    """Return whether cells may be in CSV quotes.

    The recipe's `quotes` decides; without it, the format and the delimiter do.
    """
    return is_quoted(files.format, delimiter) if files.quotes is None else files.quotes == "csv"


def names_columns(place: Place, task: TaskConfig, first: list[str]) -> bool:
    """Return whether the first line of a file names the columns.

    first: the cells of that line. Raises UserError, instead of guessing, if the recipe gives
    columns as numbers and no `header`, and the line could be a row.
    """
    files = task.data
    if files.header is not None:
        return files.header
    columns = [column for column in label_columns(files) if isinstance(column, int)]
    if files.format == "table" and columns and not _by_name(files) and max(columns) < len(first):
        layout = Layout(text=0, label=columns[0], indicators=indicators(files))
        if label_reader(task, layout).can_read([first[column] for column in columns]):
            raise UserError(
                f"{place}, line 1: the columns are numbers, and this line could be a row (column {columns[0]} holds "
                f"{quoted(first[columns[0]])}). Set header: false in the task's data if it is one, header: true if it "
                "names the columns."
            )
    return has_header(files.format, first)


def label_columns(files: FileConfig) -> tuple[str | int, ...]:
    """Return the columns of the labels that the recipe names, () for none."""
    given = files.columns.get("label", [])
    return tuple(given) if isinstance(given, list) else (given,)


def indicators(files: FileConfig) -> tuple[str | int, ...]:
    """Return the indicator columns, one for each label; () if one column has the labels."""
    return label_columns(files) if isinstance(files.columns.get("label"), list) else ()


def _by_name(files: FileConfig) -> bool:
    columns = [one for given in files.columns.values() for one in (given if isinstance(given, list) else [given])]
    return any(isinstance(column, str) for column in columns)


def check_columns(place: Place, source: Source, layout: Layout, files: FileConfig, *, require_labels: bool) -> None:
    """Raise UserError for a column that is missing or occurs twice in the header."""
    named = [(role, column) for role, column in layout.columns.items() if role != "label"]
    if require_labels:
        named += [("label", column) for column in layout.label_columns]
    for role, column in named:
        if role == "id" and "id" not in files.columns and column not in source.header:
            continue
        check_column(place, source, role, column)


def check_column(place: Place, source: Source, role: str, column: str | int) -> None:
    """Raise UserError for a column that is missing or occurs twice in the header.

    role: its key in `data.columns`, for the message.
    """
    if isinstance(column, int):
        there = source.first is not None and column < len(source.first)
    else:
        there = column in source.header
    if not there:
        names = listed(filter(None, source.header)) or f"{len(source.first or ())} columns without names"
        raise UserError(f"{place}: no column '{shortened(str(column))}' for {role}; the file has {names}")
    if source.header.count(column) > 1:  # type: ignore[arg-type]
        raise UserError(f"{place}, line 1: two columns are named '{shortened(str(column))}': give its number instead")


def looks_like_row(source: Source, layout: Layout, task: TaskConfig, cells: list[str]) -> bool:
    """Return whether a line inside a quoted cell looks like a complete row.

    cells: those of the line. A line looks like a row if it has as many cells as there are columns
    and a valid label. In a file without a label column the number of cells decides alone if the
    delimiter is a tab. With commas no line looks like a row, since texts contain commas.
    """
    if len(cells) != len(source.header) or len(cells) < 2:
        return False
    places = [one if isinstance(one, int) else _index(source.header, one) for one in layout.label_columns]
    labels = [cells[place] for place in places if place is not None and place < len(cells)]
    if len(labels) < len(places):
        return source.delimiter == "\t"
    return any(labels) and label_reader(task, layout).can_read(labels)  # an empty cell says nothing


def _index(header: list[str], column: str) -> int | None:
    return header.index(column) if column in header else None


def check_undecided_quotes(place: Place, record: Record, columns: Iterable[str | int | None]) -> None:
    """Raise UserError for a text with CSV quotes. columns: those with texts.

    Called for files that are read without quotes because the recipe has no `quotes`.
    """
    for column in columns:
        cell = None if column is None else record.cells.get(column)
        if isinstance(cell, str) and '""' in cell[1:-1] and _CSV_QUOTED.fullmatch(cell.strip()):
            where = f"{place}, line {record.line}, column {shortened(str(column))}"
            raise UserError(
                f"{where}: {quoted(cell)} is quoted as CSV does it, but files with tabs are read without quotes. "
                "Set quotes: csv in the task's data, or quotes: none if the quotes belong to the text."
            )
