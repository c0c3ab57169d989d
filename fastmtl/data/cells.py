"""The content of a record's cells as text."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fastmtl.data.labels import CELLS, BadCell
from fastmtl.data.places import Place
from fastmtl.data.records import Record, where
from fastmtl.data.text_column import NumberColumn, taken
from fastmtl.errors import quoted


def repeated_ids(place: Place, ids: Sequence[str], lines: Sequence[int | str]) -> list[str]:
    """Return a note about rows whose id an earlier row has too; an empty list if there are none.

    lines: as in BadRow.
    """
    if isinstance(ids, NumberColumn):
        return []
    hashes = np.fromiter(map(hash, ids), np.int64, len(ids))
    order = np.argsort(hashes, kind="stable")
    same = np.diff(hashes[order]) == 0
    if not same.any():
        return []
    likely = np.unique(np.concatenate([order[:-1][same], order[1:][same]]))  # hashes of different ids may be equal
    first: dict[str, int | str] = {}
    repeated = [
        (row_id, lines[row])
        for row, row_id in zip(likely.tolist(), taken(ids, likely), strict=True)
        if first.setdefault(row_id, lines[row]) != lines[row]
    ]
    if not repeated:
        return []
    row_id, line = repeated[0]
    return [
        f"{place.name}: {len(repeated)} rows have an id that an earlier row has too, the first is {quoted(row_id)} in "
        f"{where(line)} and {where(first[row_id])}"
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
    return content_of(record, column).strip()


def content_of(record: Record, column: str | int) -> str:
    """Return the text of a cell with its spaces; otherwise as `cell_of`."""
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
    return text


def _kind(value: object) -> str:
    names: dict[type, str] = {bytes: "binary data", list: "a list", dict: "an object"}
    return names.get(type(value), f"{type(value).__name__} {quoted(value)}")
