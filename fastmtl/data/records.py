"""Reading of CSV, TSV, JSON lines (all UTF-8) and tables as records with line numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain, dropwhile, islice
from pathlib import Path
from typing import Any

from fastmtl.data import spill
from fastmtl.data.delimited import ADVICE, Line, LooksLikeRow, parse_first, parse_rows
from fastmtl.data.file_bytes import JSON_LINES, Content, ending, find_bad_byte
from fastmtl.data.places import Place, Table
from fastmtl.errors import UserError, one_line, shortened

_OBJECT = 400  # bytes of a JSON object in memory, besides its texts


@dataclass(frozen=True)
class BadRow:
    """An unusable row: its place in the file, its column, and the error message.

    line: its line number (Parquet: row number), or a text for a file whose rows are no lines.
    missing: True for a row that only lacks its label (`data.missing_labels`).
    """

    line: int | str
    column: str
    reason: str
    missing: bool = False

    def __str__(self) -> str:
        return one_line(f"{where(self.line)}, column {shortened(self.column)}: {self.reason}")


def where(line: int | str) -> str:
    """Return the place of a row as it appears in a message. line: as in BadRow."""
    return f"line {line}" if isinstance(line, int) else line


@dataclass(frozen=True)
class Record:
    """One row of a file.

    line: its line number (Parquet: row number). cells: the cells by column name; in CSV and TSV
    files also by column number from 0. name: its place in a file whose rows are no lines.
    """

    line: int
    cells: Mapping[str | int, object]
    name: str | None = None

    @property
    def place(self) -> int | str:
        """The place of the row, as in BadRow."""
        return self.name or self.line


# Called with every bad row: either raises an error, or records the row so that it is skipped.
OnBadRow = Callable[[BadRow], None]


@dataclass(frozen=True)
class Source:
    """An opened file.

    header: the column names; a file without a header has empty names. first: the cells of the first
    line of a CSV or TSV file, else None. delimiter: the delimiter of a CSV or TSV file, else None.
    records: a function that yields all rows. Its argument is a function that takes the cells of a
    line inside a quoted cell and returns whether the line looks like a row.
    """

    header: list[str]
    records: Callable[[LooksLikeRow], Iterator[Record]]
    first: list[str] | None = None
    delimiter: str | None = None


def open_source(
    place: Place, quoted: Callable[[str], bool], header: Callable[[list[str]], bool], bad: OnBadRow
) -> Source:
    """Open a table, or a file of text by its suffix: JSON lines, or else tabs or commas.

    quoted: a function that takes the delimiter and returns whether the file has CSV quotes.
    header: a function that takes the cells of the first line and returns whether they name the
    columns. bad: called with every bad row, while `Source.records` yields the rows. Raises
    UserError for a missing, unreadable or empty file and for an unreadable first line.
    """
    if isinstance(place, Table):
        return _table(place)
    path = place
    content = Content(path)
    if ending(path) in JSON_LINES or (not ending(path) and content.first_byte() == b"{"):
        return _json_lines(path, content, bad)
    return _delimited(path, content, quoted, header, bad)


def _check_any(path: Path, lines: Iterator[Line]) -> Iterator[Line]:
    """Return the lines. Raises UserError if there are none."""
    first = next(lines, None)
    if first is None:
        raise UserError(f"{path}: the file is empty")
    return chain([first], lines)


def _delimited(
    path: Path,
    content: Content,
    quoted: Callable[[str], bool],
    has_header: Callable[[list[str]], bool],
    bad: OnBadRow,
) -> Source:
    first_lines = list(islice(_check_any(path, _rows_of_cells(content)), 100))
    number, text = first_lines[0]
    bad_byte = find_bad_byte(text)
    if bad_byte is not None:  # an error even with on_bad_row: skip, since this line may be the header
        raise UserError(f"{path}, line {number}, byte {bad_byte[0]}: {bad_byte[1]}")
    delimiter = "\t" if ending(path) == ".tsv" or _has_tabs(first_lines) else ","
    try:
        cells, taken = parse_first(_lines(content, delimiter), delimiter, quoted=quoted(delimiter))
        first = [cell.strip() for cell in cells]
        names_columns = has_header(first)
        if names_columns and taken > 1:
            raise ValueError(f"its quote is not closed in this line; {ADVICE}")
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}, line {number}: {error}") from None
    header = first if names_columns else [""] * len(first)
    lines = partial(_lines, content, delimiter, skip=int(names_columns))
    records = partial(_cells_by_column, lines, header, delimiter, quoted(delimiter), bad)
    return Source(header, records, first, delimiter)


def _rows_of_cells(content: Content) -> Iterator[Line]:
    """Yield the lines from the first that is not blank; a line of tabs only cannot be a header."""
    return dropwhile(lambda line: not line[1].strip(), content.lines())


def _lines(content: Content, delimiter: str, skip: int = 0) -> Iterator[Line]:
    lines = _rows_of_cells(content)
    return islice(lines if delimiter == "\t" else (line for line in lines if line[1].strip()), skip, None)


def _has_tabs(lines: list[Line]) -> bool:
    """Return whether the delimiter is the tab. lines: the first 100 lines of the file.

    It is if the first line has tabs and no commas, or if it has both and most of the lines have
    tabs.
    """
    first = lines[0][1]
    return "\t" in first and ("," not in first or 2 * sum("\t" in text for _, text in lines) > len(lines))


def _cells_by_column(
    lines: Callable[[], Iterator[Line]],
    header: list[str],
    delimiter: str,
    quoted: bool,
    bad: OnBadRow,
    looks_like_row: LooksLikeRow,
) -> Iterator[Record]:
    def report(line: int, column: str, reason: str) -> None:
        bad(BadRow(line, column, reason))

    rows = parse_rows(lines(), delimiter, quoted=quoted, looks_like_row=looks_like_row, on_bad_line=report)
    for line, cells in rows:
        if len(cells) != len(header):
            where = (header[len(cells)] or str(len(cells) + 1)) if len(cells) < len(header) else str(len(header) + 1)
            bad(BadRow(line, where, f"expected {len(header)} columns, found {len(cells)}"))
            continue
        yield Record(line, {**dict(enumerate(cells)), **dict(zip(header, cells, strict=True))})


def _json_lines(path: Path, content: Content, bad: OnBadRow) -> Source:
    """Open a file of JSON lines. Every line is parsed here, since any may have a further column.

    The records of a large file are not kept: `Source.records` parses the lines again.
    """
    lines = (line for line in content.lines() if line[1].strip())
    records: list[Record] | None = []
    header: dict[str, None] = {}
    size = 0
    for number, value, length in _objects(_check_any(path, lines), bad):
        header.update(dict.fromkeys(value))
        size += length + _OBJECT
        if size > spill.IN_MEMORY:
            records = None
        if records is not None:
            records.append(Record(number, value))
    if records is not None:
        kept = records
        return Source(list(header), lambda _: iter(kept))

    def parsed_again(_: LooksLikeRow) -> Iterator[Record]:
        again = (line for line in content.lines() if line[1].strip())
        objects = _objects(again, lambda _: None)  # bad lines have been reported
        return (Record(number, value) for number, value, _ in objects)

    return Source(list(header), parsed_again)


def _objects(lines: Iterator[Line], bad: OnBadRow) -> Iterator[tuple[int, dict[Any, Any], int]]:
    """Yield the number of every line, its JSON object and its number of characters."""
    for number, text in lines:
        bad_byte = find_bad_byte(text)
        if bad_byte is not None:
            bad(BadRow(number, f"byte {bad_byte[0]}", bad_byte[1]))
            continue
        try:
            value = json.loads(text, object_pairs_hook=_each_key_once)
        except json.JSONDecodeError as error:
            bad(BadRow(number, str(error.colno), f"expected a JSON object: {error.msg}"))
        except (ValueError, RecursionError) as error:  # a key twice, a number of thousands of digits, or deep nesting
            bad(BadRow(number, "1", str(error)))
        else:
            if isinstance(value, dict):
                yield number, value, len(text)
            else:
                bad(BadRow(number, "1", f"expected a JSON object, found {type(value).__name__}"))


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for index, (key, _) in enumerate(pairs) if key in dict(pairs[:index]))
        raise ValueError(f"the key '{shortened(twice)}' occurs twice in the JSON object")
    return found


def _table(table: Table) -> Source:
    rows = (cells for batch in table.batches() for cells in batch)
    return Source(table.header, lambda _: (Record(number, cells) for number, cells in enumerate(rows, start=1)))
