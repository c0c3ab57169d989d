"""Reading and tokenisation of choices: a question or none, texts, and the right one's number."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fastmtl.config import TaskConfig
from fastmtl.data.candidates import (
    Column,
    RowsBuilder,
    columns_of,
    encode_candidates,
    labels_as_they_are,
    open_table,
    records_of,
    texts_of,
)
from fastmtl.data.cells import cell_of, text_of
from fastmtl.data.labels import CELLS, BadCell
from fastmtl.data.places import Place
from fastmtl.data.records import BadRow, OnBadRow, Record
from fastmtl.data.rows import Rows
from fastmtl.data.text_column import TextBuilder
from fastmtl.data.types.spec import Arrays, DataType
from fastmtl.errors import UserError, quoted
from fastmtl.files.label_text import as_label, as_number

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read(place: Place, task: TaskConfig, bad: OnBadRow, *, require_labels: bool, numbers: Iterator[int]) -> Rows:
    """Return the rows of one place; see `ReadRows`."""
    source = open_table(place, task, bad)
    columns = columns_of(place, source, task, ("id", "text", "choices", *(["label"] if require_labels else [])))
    rows, labels = RowsBuilder(), LabelReader(task.choice.labels)
    for record, number in zip(records_of(place, source, task, columns), numbers, strict=False):
        try:
            text = text_of(record, columns["text"][0]) if "text" in columns else ""
            choices = _choices(record, columns["choices"])
            label = _label(record, columns["label"][0]) if require_labels else ""
            row_id = cell_of(record, columns["id"][0]) if "id" in columns else None
        except BadCell as cell:
            bad(cell.row(record.line))
            continue
        rows.add(record, row_id, number, text, choices)
        if require_labels:
            labels.add(label, choices)
    found = rows.done(place, has_ids="id" in columns, labelled=False)
    return labels.labelled(found, rows.lines, columns["label"][0], bad) if require_labels else found


def _choices(record: Record, columns: list[Column]) -> list[str]:
    """Return the texts to choose from.

    Raises BadCell for fewer than two, and for an empty column before a filled one.
    """
    found = texts_of(record, columns)
    if len(columns) == 1 and not isinstance(record.cells.get(columns[0]), list | tuple):
        raise BadCell(columns[0], "expected a list of texts to choose from, found a text or nothing")
    filled = [number for number, texts in enumerate(found) if texts]
    for number, (column, texts) in enumerate(zip(columns, found, strict=True)):
        if not texts and number < max(filled, default=0):
            raise BadCell(column, "expected a text, found none; only the last of the columns of choices may be empty")
    choices = [text for texts in found for text in texts]
    if len(choices) < 2:
        raise BadCell(
            columns[min(len(choices), len(columns) - 1)], f"expected two choices or more, found {len(choices)}"
        )
    return choices


def _label(record: Record, column: Column) -> str:
    value = record.cells.get(column)
    if value is not None and not isinstance(value, CELLS):
        raise BadCell(column, f"expected the right choice, found {quoted(value)}")
    label = " ".join(as_label(value).split())
    if not label:
        raise BadCell(column, "expected the right choice, found nothing", missing=True)
    return label


def number_of(kind: str, label: str, choices: list[str]) -> int | None:
    """Return the number from 0 of the choice that a label names, None if it names none.

    kind: a value of the setting choice.labels, except auto.
    """
    if kind == "texts":
        texts = [as_label(text) for text in choices]
        return texts.index(label) if texts.count(label) == 1 else None
    if kind == "letters":
        number = ord(label.upper()) - ord("A") if len(label) == 1 and label.isascii() else -1
    else:
        value = as_number(label)
        number = -1 if value is None or not value.is_integer() else int(value) - (kind == "from_1")
    return number if 0 <= number < len(choices) else None


EXPECTED = {
    "from_0": "a number from 0 to {last}, that of the right one of {count} choices (choice.labels: from_1 if the "
    "first one's is 1)",
    "from_1": "a number from 1 to {count}, that of the right one of {count} choices",
    "letters": "a letter from A to {letter}, that of the right one of {count} choices",
    "texts": "the text of one of the {count} choices, which no other one has",
}


class LabelReader:
    """The labels of a file, in every meaning that the setting choice.labels allows."""

    def __init__(self, setting: str) -> None:
        kinds = ["from_0", "letters", "texts"] if setting == "auto" else [setting]
        self._labels = TextBuilder()
        self._numbers = {kind: array("q") for kind in kinds}  # of the right choices; -1: the label names none

    def add(self, label: str, choices: list[str]) -> None:
        self._labels.append(label)
        for kind, numbers in self._numbers.items():
            number = number_of(kind, label, choices)
            numbers.append(-1 if number is None else number)

    def labelled(self, rows: Rows, lines: Sequence[int], column: Column, bad: OnBadRow) -> Rows:
        """Return the rows with the numbers of the right choices, without rows that have none.

        Among several meanings that one counts which names a choice in the most rows. Raises
        UserError if two fit all rows and differ.
        """
        assert rows.items is not None
        labels, found = self._labels.done(), {kind: np.array(numbers) for kind, numbers in self._numbers.items()}
        best = max(found, key=lambda kind: (found[kind] >= 0).sum())
        for kind, numbers in found.items():
            different = numbers != found[best]
            if (numbers >= 0).all() and different.any():
                row = int(different.argmax())
                raise UserError(
                    f"{rows.path}, line {lines[row]}, column {column}: {quoted(labels[row])} may be choice "
                    f"{numbers[row]} or {found[best][row]}, as all labels of the file fit both {best} and {kind}: set "
                    "choice.labels of the task"
                )
        counts = np.diff(rows.items.offsets)
        for row in np.flatnonzero(found[best] < 0).tolist():
            count = int(counts[row])
            expected = EXPECTED[best].format(count=count, last=count - 1, letter=chr(ord("A") + min(count, 26) - 1))
            bad(BadRow(lines[row], str(column), f"expected {expected}, found {quoted(labels[row])}"))
        kept = np.flatnonzero(found[best] >= 0)
        return dataclasses.replace(rows if len(kept) == len(rows) else rows.take(kept), labels=found[best][kept])


def encode(rows: Rows, tokenizer: PreTrainedTokenizerBase, task: TaskConfig, max_length: int) -> tuple[Arrays, int]:
    """Tokenise each choice with the row's text, or alone if rows have none; see `Encode`."""
    return encode_candidates(rows, tokenizer, max_length, apart=False)


CHOICE = DataType(read, encode, labels_as_they_are, lambda task: [])
