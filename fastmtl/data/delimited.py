"""Rows of CSV and TSV files, each with the line it begins on. No row is lost without a word.

With quotes, a cell in double quotes may hold delimiters and line ends, and a quote inside it is doubled (RFC 4180).
Everything else is a bad row: a quote that is never closed, text after a closing quote, and a quoted cell over lines of
which one looks like a row itself. A bad row is one line: reading continues on the next.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Literal

# A line of a file: its number from 1 and its text without the end.
Line = tuple[int, str]
# Called with the cells of a line read without quotes: whether they could be a row of the file.
LooksLikeRow = Callable[[list[str]], bool]
# Called with a line number and what is wrong there.
OnBadLine = Callable[[int, str], None]

ADVICE = "write it twice inside a quoted cell, or set quotes: none where quotes are text"


def parse_line(line: str, delimiter: str, *, quoted: bool) -> list[str]:
    """Return the cells of one line. Raises ValueError where its quotes are wrong."""
    with _long_cells():
        try:
            (cells,) = csv.reader([line], delimiter=delimiter, quoting=_quoting(quoted), strict=quoted)
        except csv.Error as error:
            raise ValueError(_problem(str(error), delimiter)) from None
    return cells


def parse_rows(
    lines: Sequence[Line], delimiter: str, *, quoted: bool, looks_like_row: LooksLikeRow, on_bad_line: OnBadLine
) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of a row's first line and its cells, for all rows that can be read."""
    begin = 0
    while begin < len(lines):
        start = begin  # a reader that found a mistake is left for a new one on the next line
        reader = csv.reader(
            (text + "\n" for _, text in islice(lines, start, None)),
            delimiter=delimiter,
            quoting=_quoting(quoted),
            strict=quoted,
        )
        while begin < len(lines):
            number = lines[begin][0]
            try:
                with _long_cells():
                    cells = next(reader)
            except csv.Error as error:
                last = lines[min(start + reader.line_num, len(lines)) - 1][0]
                spans = f"the quoted cell that begins here reaches line {last}: " if last != number else ""
                on_bad_line(number, spans + _problem(str(error), delimiter))
                begin += 1
                break
            end = start + reader.line_num
            swallowed = next(
                (line for line, text in lines[begin : end - 1] if looks_like_row(text.split(delimiter))), 0
            )
            if swallowed:
                on_bad_line(
                    number,
                    f"the quoted cell that begins here ends in line {lines[end - 1][0]}, and line {swallowed} looks "
                    f"like a row of its own. Where the quote belongs to the text, {ADVICE}",
                )
                begin += 1
                break
            yield number, cells
            begin = end


def _quoting(quoted: bool) -> Literal[0, 3]:
    return csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE


def _problem(error: str, delimiter: str) -> str:
    """Return what csv says in words of the file."""
    if error.startswith("unexpected end"):
        return f"its quote is never closed; {ADVICE}"
    if error.endswith("expected after '\"'"):
        return f"there is text after the quote that closes a cell; {ADVICE}"
    return f"not readable as {'TSV' if delimiter == chr(9) else 'CSV'}: {error}"


@contextmanager
def _long_cells() -> Iterator[None]:
    """Lift csv's limit on the length of a cell, a setting of the whole process, for one call."""
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)
