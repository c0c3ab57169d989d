"""Reading and tokenisation of choices: a question or none, texts, and the right one's number."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from fastmtl.config import TaskConfig
from fastmtl.data.candidates import (
    Column,
    columns_of,
    encode_candidates,
    items_of,
    labels_as_they_are,
    open_table,
    records_of,
    texts_of,
)
from fastmtl.data.cells import cell_of, repeated_ids, text_of
from fastmtl.data.labels import CELLS, BadCell
from fastmtl.data.places import Place
from fastmtl.data.records import BadRow, OnBadRow, Record
from fastmtl.data.rows import Rows
from fastmtl.data.types.spec import Arrays, DataType
from fastmtl.errors import UserError, quoted
from fastmtl.files.label_text import as_label, as_number

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read(place: Place, task: TaskConfig, bad: OnBadRow, *, require_labels: bool, numbers: Iterator[int]) -> Rows:
    """Return the rows of one place; see `ReadRows`."""
    source = open_table(place, task, bad)
    columns = columns_of(place, source, task, ("id", "text", "choices", *(["label"] if require_labels else [])))
    of_texts = [*columns.get("text", []), *columns["choices"]]
    ids, texts, choices, labels, lines = [], [], [], [], []
    for record, number in zip(records_of(place, source, task, of_texts), numbers, strict=False):
        try:
            texts.append(text_of(record, columns["text"][0]) if "text" in columns else "")
            choices.append(_choices(record, columns["choices"]))
            labels.append(_label(record, columns["label"][0]) if require_labels else "")
            ids.append(cell_of(record, columns["id"][0]) if "id" in columns else "")
        except BadCell as cell:
            bad(cell.row(record.line))
            texts, choices, labels = texts[: len(ids)], choices[: len(ids)], labels[: len(ids)]
            continue
        ids[-1] = ids[-1] or str(number)
        lines.append(record.line)
    rows = Rows(
        path=place,
        ids=ids,
        texts=texts,
        pair_texts=None,
        labels=None,
        notes=repeated_ids(place, ids, lines),
        items=items_of(choices, labelled=False),
    )
    return _labelled(rows, labels, lines, task, columns["label"][0], bad) if require_labels else rows


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


def _labelled(rows: Rows, labels: list[str], lines: list[int], task: TaskConfig, column: Column, bad: OnBadRow) -> Rows:
    """Return the rows with the numbers of the right choices, without rows without one."""
    assert rows.items is not None
    kind, numbers = _kind_of(rows, labels, lines, task, column)
    kept = []
    for row, (label, line, number) in enumerate(zip(labels, lines, numbers, strict=True)):
        if number is not None:
            kept.append(row)
            continue
        count = len(rows.items.of(row))
        expected = EXPECTED[kind].format(count=count, last=count - 1, letter=chr(ord("A") + min(count, 26) - 1))
        bad(BadRow(line, str(column), f"expected {expected}, found {quoted(label)}"))
    found = rows.take(kept) if len(kept) < len(rows) else rows
    chosen = np.array([numbers[row] for row in kept], dtype=np.int64)
    return dataclasses.replace(found, labels=chosen)


def _kind_of(
    rows: Rows, labels: list[str], lines: list[int], task: TaskConfig, column: Column
) -> tuple[str, list[int | None]]:
    """Return what the labels of a file are, and the number of each row's right choice or None.

    With choice.labels: auto they are what names a choice in the most rows. Raises UserError if two
    meanings fit all rows and differ.
    """
    assert rows.items is not None
    choices = [rows.items.of(row) for row in range(len(rows))]
    kinds = ["from_0", "letters", "texts"] if task.choice.labels == "auto" else [task.choice.labels]
    found = {
        kind: [number_of(kind, label, texts) for label, texts in zip(labels, choices, strict=True)] for kind in kinds
    }
    best = max(kinds, key=lambda kind: sum(number is not None for number in found[kind]))
    for kind, numbers in found.items():
        if kind == best or None in numbers or numbers == found[best]:
            continue
        row = next(row for row, (one, other) in enumerate(zip(numbers, found[best], strict=True)) if one != other)
        raise UserError(
            f"{rows.path}, line {lines[row]}, column {column}: {quoted(labels[row])} may be choice {numbers[row]} or "
            f"{found[best][row]}, as all labels of the file fit both {best} and {kind}: set choice.labels of the task"
        )
    return best, found[best]


def encode(rows: Rows, tokenizer: PreTrainedTokenizerBase, task: TaskConfig, max_length: int) -> tuple[Arrays, int]:
    """Tokenise each choice with the row's text, or alone if rows have none; see `Encode`."""
    return encode_candidates(rows, tokenizer, max_length, apart=False)


CHOICE = DataType(read, encode, labels_as_they_are, lambda task: [])
