"""The content of a record's cells as text."""

from __future__ import annotations

import math

from fastmtl.data.labels import CELLS, BadCell
from fastmtl.data.places import Place
from fastmtl.data.records import Record
from fastmtl.errors import quoted


def repeated_ids(place: Place, ids: list[str], lines: list[int]) -> list[str]:
    first: dict[str, int] = {}
    repeated = [
        (row_id, line) for row_id, line in zip(ids, lines, strict=True) if first.setdefault(row_id, line) != line
    ]
    if not repeated:
        return []
    row_id, line = repeated[0]
    return [
        f"{place.name}: {len(repeated)} rows have an id that an earlier row has too, the first is {quoted(row_id)} in "
        f"line {line} and line {first[row_id]}"
    ]


def text_of(record: Record, column: str | int) -> str:
    text = cell_of(record, column)
    if not text:
        raise BadCell(column, "expected a text, found none")
    return " ".join(text.split())  # a BERT tokenizer treats several spaces as one


def cell_of(record: Record, column: str | int) -> str:
    """Return the text of a cell without surrounding spaces, "" for an empty or missing cell.

    Raises BadCell for a value that is not text or a number.
    """
    value = record.cells.get(column)
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if not isinstance(value, CELLS):
        raise BadCell(column, f"expected a text, found {_kind(value)}")
    text = str(value)
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadCell(
                column, f"expected a text, found half of a surrogate pair (U+{ord(text[error.start]):04X})"
            ) from None
    return text.strip()


def _kind(value: object) -> str:
    names: dict[type, str] = {bytes: "binary data", list: "a list", dict: "an object"}
    return names.get(type(value), f"{type(value).__name__} {quoted(value)}")
