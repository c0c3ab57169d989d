"""Rows with several texts each: the candidates of a choice or of a query."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from fastmtl.config import FileConfig, TaskConfig
from fastmtl.data.cells import repeated_ids, text_of
from fastmtl.data.columns import check_column, check_undecided_quotes, uses_quotes
from fastmtl.data.encode import encode_sequences
from fastmtl.data.labels import BadCell
from fastmtl.data.places import Place
from fastmtl.data.records import OnBadRow, Record, Source, open_source
from fastmtl.data.rows import Items, Rows
from fastmtl.data.text_column import TextBuilder, row_numbers
from fastmtl.errors import UserError, quoted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Column = str | int
LISTS = (list, tuple)


def open_table(place: Place, task: TaskConfig, bad: OnBadRow) -> Source:
    """Open a file of candidates. Raises UserError as `open_source` does."""
    return open_source(place, partial(uses_quotes, task.data), partial(_names_columns, place, task.data), bad)


def _names_columns(place: Place, files: FileConfig, first: list[str]) -> bool:
    given = [one for columns in files.columns.values() for one in (columns if isinstance(columns, list) else [columns])]
    if files.header is None and given and all(isinstance(column, int) for column in given):
        raise UserError(
            f"{place}, line 1: the columns are numbers; set header: true in the task's data if this line "
            f"names the columns, header: false if it is a row (its first cell is {quoted(first[0])})"
        )
    return files.header is not False


def columns_of(place: Place, source: Source, task: TaskConfig, roles: Sequence[str]) -> dict[str, list[Column]]:
    """Return the columns of each role, by default the one of the role's name.

    A name such as `choices.text` is a part of the objects in column `choices`. Raises UserError for
    a column that is missing or occurs twice in the header. An `id`, and the `text` of type choice,
    may be missing if the recipe does not name them.
    """
    found: dict[str, list[Column]] = {}
    for role in roles:
        given = task.data.columns.get(role)  # type: ignore[call-overload]
        optional = role == "id" or (role == "text" and task.type == "choice")
        if given is None and optional and role not in source.header:
            continue
        found[role] = list(given) if isinstance(given, list) else [role if given is None else given]
        for column in found[role]:
            whole, part = _parts(column)
            check_column(place, source, role, whole if part and column not in source.header else column)
    return found


def _parts(column: Column) -> tuple[str, str]:
    """Return the name of the column and of the part of its objects, "" without one."""
    whole, _, part = str(column).partition(".")
    return whole, part


def records_of(place: Place, source: Source, task: TaskConfig, columns: Mapping[str, list[Column]]) -> Iterator[Record]:
    """Yield the records of a file. columns: those of each role.

    Raises UserError for a text in CSV quotes in a file that is read without quotes only because the
    recipe has no `quotes`.
    """
    files = task.data
    undecided = source.delimiter is not None and files.quotes is None and not uses_quotes(files, source.delimiter)
    of_texts = [column for role in ("text", "text_pair", "choices") for column in columns.get(role, [])]
    nested = [one for given in columns.values() for one in given if isinstance(one, str) and one not in source.header]
    for record in source.records(partial(_inside_quotes, source)):
        if undecided:
            check_undecided_quotes(place, record, of_texts)
        if nested:
            record = Record(record.line, {**record.cells, **{name: _nested(record, name) for name in nested}})
        yield record


def _nested(record: Record, column: str) -> object:
    whole, part = _parts(column)
    cell = record.cells.get(whole)
    return cell.get(part) if isinstance(cell, Mapping) else None


def _inside_quotes(source: Source, cells: list[str]) -> bool:
    """Return whether a line inside a quoted cell looks like a row: it has as many tabs as one."""
    return source.delimiter == "\t" and len(cells) == len(source.header) > 1


def texts_of(record: Record, columns: Sequence[Column]) -> list[list[str]]:
    """Return the texts of each column, whose cell is a text or a list of texts.

    An empty cell has no text. Raises BadCell for anything else, and for an empty text in a list.
    """
    found = []
    for column in columns:
        cell = record.cells.get(column)
        if isinstance(cell, LISTS):
            found.append([_entry(record.line, column, number, text) for number, text in enumerate(cell)])
        else:
            found.append([text_of(record, column)] if _filled(cell) else [])
    return found


def _filled(cell: object) -> bool:
    return cell is not None and cell == cell and str(cell).strip() != ""  # not None, not nan


def _entry(line: int, column: Column, number: int, text: object) -> str:
    try:
        return text_of(Record(line, {column: text}), column)
    except BadCell as cell:
        raise BadCell(column, f"entry {number} of the list: {cell.reason}") from None


class RowsBuilder:
    """The rows of a place while they are read. Large columns move to temporary files."""

    def __init__(self) -> None:
        self._ids, self._texts, self._items = TextBuilder(), TextBuilder(), TextBuilder()
        self._numbers, self._counts = array("q"), array("q")
        self.lines: array[int] = array("q")

    def add(self, record: Record, row_id: str | None, number: int, text: str, candidates: Sequence[str]) -> None:
        """Add a row. row_id: the content of its id column, None in a file without one."""
        if row_id is not None:
            self._ids.append(row_id or str(number))
        self._numbers.append(number)
        self._texts.append(text)
        self._items.extend(candidates)
        self._counts.append(len(candidates))
        self.lines.append(int(record.line))

    def done(self, place: Place, *, has_ids: bool, labelled: bool) -> Rows:
        """Return the rows without labels. labelled: as in `Items`."""
        ids = self._ids.done() if has_ids else row_numbers(self._numbers)
        return Rows(
            path=place,
            ids=ids,
            texts=self._texts.done(),
            pair_texts=None,
            labels=None,
            notes=repeated_ids(place, ids, self.lines) if has_ids else [],
            items=Items(self._items.done(), offsets_of(self._counts), labelled),
        )


def offsets_of(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return 0 and the cumulated counts, int64 [n + 1]."""
    return np.concatenate([[0], np.cumsum(np.asarray(counts, dtype=np.int64))])


def items_of(candidates: Sequence[Sequence[str]], *, labelled: bool) -> Items:
    """Return the candidates of all rows as `Items`."""
    return Items([text for texts in candidates for text in texts], offsets_of([*map(len, candidates)]), labelled)


def encode_candidates(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, max_length: int, *, apart: bool
) -> tuple[dict[str, np.ndarray], int]:
    """Tokenise each candidate with its row's text, or alone if that is empty; see `Encode`.

    apart: True to make a sequence of each row's text, and one of each of its candidates.
    """
    assert rows.items is not None
    offsets = rows.items.offsets
    counts = np.diff(offsets)
    sequences = offsets
    if apart:
        sequences = offsets + np.arange(len(offsets))
        texts = [text for row, query in enumerate(rows.texts) for text in (query, *rows.items.of(row))]
        arrays, long = encode_sequences(texts, None, tokenizer, max_length, rows.path)
    elif all(rows.texts):
        texts = [text for text, count in zip(rows.texts, counts.tolist(), strict=True) for _ in range(count)]
        arrays, long = encode_sequences(texts, rows.items.texts, tokenizer, max_length, rows.path)
    elif any(rows.texts):
        raise UserError(f"{rows.path}: some rows have a text before their choices and some have none: write two tasks")
    else:
        arrays, long = encode_sequences(rows.items.texts, None, tokenizer, max_length, rows.path)
    cut = np.searchsorted(sequences, np.asarray(long, dtype=np.int64), side="right")
    return {**arrays, "example_offsets": sequences, "unit_offsets": offsets}, len(np.unique(cut))


def labels_as_they_are(
    rows: Rows, arrays: Mapping[str, np.ndarray], task: TaskConfig
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return the rows' labels, and one loss term per row; see `Label`."""
    return rows.labels, None
