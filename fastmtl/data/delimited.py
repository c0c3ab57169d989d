"""Rows of CSV and TSV files, each with the number of its first line. Every bad row is reported.

In a file with quotes, a cell in double quotes may contain delimiters and line ends, and a quote
inside the cell is doubled (RFC 4180). A row is bad if a quote is never closed, if text follows a
closing quote, or if a quoted cell contains a line that looks like a complete row (its quote was
probably never meant to be one). After a bad row, reading continues on the line after the row's
first line.
"""

from __future__ import annotations

import csv
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

from fastmtl.data.file_bytes import find_bad_byte

# A line of a file: its number from 1 and its text without the line end.
Line = tuple[int, str]
# Takes the cells of a line, split as if there were no quotes. Returns whether they could be a row.
LooksLikeRow = Callable[[list[str]], bool]
# Called for a bad row with the number of its first line, the column (or byte) and the reason.
OnBadLine = Callable[[int, str, str], None]

ADVICE = "write it twice inside a quoted cell, or set quotes: none where quotes are text"


def parse_first(lines: Iterator[Line], delimiter: str, *, quoted: bool) -> tuple[list[str], int]:
    """Return the cells of the first row, and how many lines the row has.

    quoted: whether the file has CSV quotes. Raises ValueError if the quotes of the row are wrong.
    """
    reader = _reader((text + "\n" for _, text in lines), delimiter, quoted)
    with _long_cells():
        try:
            return next(reader), reader.line_num
        except csv.Error as error:
            raise ValueError(_problem(str(error), delimiter)) from None


def parse_rows(
    lines: Iterator[Line], delimiter: str, *, quoted: bool, looks_like_row: LooksLikeRow, on_bad_line: OnBadLine
) -> Iterator[tuple[int, list[str]]]:
    """Yield every valid row: the number of its first line, and its cells.

    quoted: whether the file has CSV quotes. on_bad_line: called for every bad row. Only the lines
    of a row are kept in memory, and those that are read again after a bad row.
    """
    row: list[Line] = []  # the lines that the reader has taken for the next row
    again: deque[Line] = deque()

    def texts() -> Iterator[str]:
        for line in chain(_emptied(again), lines):
            row.append(line)
            yield line[1] + "\n"

    reading = True
    while reading:
        reader = _reader(texts(), delimiter, quoted)  # after a bad row a new reader begins on the next line
        while True:
            row.clear()
            try:
                with _long_cells():
                    cells = next(reader, None)
            except csv.Error as error:
                number, last = row[0][0], row[-1][0]
                spans = f"the quoted cell that begins here reaches line {last}: " if last != number else ""
                on_bad_line(number, "1", spans + _problem(str(error), delimiter))
                break
            if cells is None:
                reading = False
                break
            number = row[0][0]
            swallowed = _swallowed(row, cells, delimiter, looks_like_row) if len(row) > 1 else None
            if swallowed is not None:
                on_bad_line(
                    number,
                    "1",
                    f"the quoted cell that begins here ends in line {row[-1][0]}, and line {swallowed} looks "
                    f"like a row of its own. Where the quote belongs to the text, {ADVICE}",
                )
                break
            bad_byte = next(((line, *found) for line, text in row if (found := find_bad_byte(text))), None)
            if bad_byte is None:
                yield number, cells
            else:
                line, position, reason = bad_byte
                on_bad_line(number, f"byte {position}", reason if line == number else f"{reason} in line {line}")
        again.extendleft(reversed(row[1:]))


def _emptied(lines: deque[Line]) -> Iterator[Line]:
    """Yield the lines and remove them."""
    while lines:
        yield lines.popleft()


def _swallowed(lines: list[Line], cells: list[str], delimiter: str, looks_like_row: LooksLikeRow) -> int | None:
    """Return the number of a line inside a quoted cell that looks like a complete row, or None.

    lines, cells: those of the row. The first and the last line of a quoted
    cell also contain the neighbouring cells. Such a line counts only if the part of it inside the
    quotes contains a delimiter.
    """
    at = 0
    for column, cell in enumerate(cells):
        pieces = cell.split("\n")
        for index, piece in enumerate(pieces if len(pieces) > 1 else []):
            inner = piece.split(delimiter)
            if index == 0:
                row = cells[:column] + inner if len(inner) > 1 else []
            elif index == len(pieces) - 1:
                row = inner + cells[column + 1 :] if len(inner) > 1 else []
            else:
                row = inner
            if looks_like_row(row):
                return lines[at + index][0]
        at += len(pieces) - 1
    return None


def _reader(texts: Iterator[str], delimiter: str, quoted: bool) -> Any:  # csv gives its readers no public type
    return csv.reader(
        texts, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE, strict=quoted
    )


def _problem(error: str, delimiter: str) -> str:
    """Return the csv module's error message, reworded for the user."""
    if error.startswith("unexpected end"):
        return f"its quote is never closed; {ADVICE}"
    if error.endswith("expected after '\"'"):
        return f"there is text after the quote that closes a cell; {ADVICE}"
    if error.startswith("new-line character"):
        return "there is a carriage return inside the line"
    return f"not readable as {'TSV' if delimiter == chr(9) else 'CSV'}: {error}"


@contextmanager
def _long_cells() -> Iterator[None]:
    """Lift the csv module's limit on the length of a cell while the block runs.

    The limit is a global setting of the process, so it is restored afterwards.
    """
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)
