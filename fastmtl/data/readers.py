"""A task's rows from its files, every cell checked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from fastmtl.config import DataConfig, TaskConfig
from fastmtl.data.formats import Layout, find_layout, is_quoted
from fastmtl.data.records import BadRow, Record, read_records
from fastmtl.errors import UserError, listed, quoted


@dataclass(frozen=True)
class Rows:
    """n rows of a task.

    labels: int64 [n] (classification), float32 [n] (binary 0 or 1, regression), None for files without labels.
    skipped: bad rows that were left out (`on_bad_row: skip`). notes: what else was done to the file's rows.
    """

    path: Path
    ids: list[str]
    texts: list[str]
    pair_texts: list[str] | None
    labels: np.ndarray | None
    skipped: list[BadRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, chosen: Sequence[int], note: str | None = None) -> Rows:
        """The rows at these positions, in their order."""
        return dataclasses.replace(
            self,
            ids=[self.ids[row] for row in chosen],
            texts=[self.texts[row] for row in chosen],
            pair_texts=None if self.pair_texts is None else [self.pair_texts[row] for row in chosen],
            labels=None if self.labels is None else self.labels[np.asarray(chosen, dtype=np.int64)],
            notes=self.notes if note is None else [*self.notes, note],
        )


def read_rows(
    task: TaskConfig, data: DataConfig, split: Literal["train", "dev", "test"], *, require_labels: bool = True
) -> Rows:
    """The rows of a split; relative file names are looked up in `data.dir`. Errors as for `read_file`.

    Of training rows only the share `data.fraction`, drawn once and for all, and of these at most `limit`.
    """
    name = getattr(task.data, split)
    if name is None:
        raise UserError(f"the task has no {split} file: set tasks.<name>.data.{split}")
    path = Path(data.dir or ".").expanduser() / name
    rows = read_file(path, task, on_bad_row=data.on_bad_row, require_labels=require_labels)
    if split != "train":
        return rows
    return rows.take(_share(len(rows), data.fraction)[: task.data.limit].tolist())


def read_file(
    path: Path,
    task: TaskConfig,
    *,
    on_bad_row: Literal["error", "skip"] = "error",
    require_labels: bool = True,
) -> Rows:
    """Reads one file in the task's format.

    Raises UserError naming file, line and column for a bad row (missing text, label not a number or out of range, wrong
    number of columns, not UTF-8) unless on_bad_row is "skip", and for a file without rows or without a needed column.
    require_labels: a file without the label column is an error; otherwise its rows have no labels.
    """
    skipped: list[BadRow] = []

    def report(bad: BadRow) -> None:
        if on_bad_row == "error":
            raise UserError(f"{path}, {bad}. Mend the row, or set data.on_bad_row=skip to leave such rows out.")
        skipped.append(bad)

    header, records = read_records(path, is_quoted(task.data.format), report)
    columns = task.data.columns
    layout = find_layout(task.data.format, header, {str(k): v for k, v in columns.items()}, str(path))
    has_labels = str(layout.label) in _names(header)
    for role, column in layout.columns.items():
        optional = role == "id" or (role == "label" and not require_labels)
        if str(column) not in _names(header) and not optional:
            raise UserError(f"{path}: no column '{column}' for {role}; the file has {listed(filter(None, header))}")
    ids, texts, pair_texts, labels = [], [], [], []
    for position, record in enumerate(records):
        try:
            text = _text(record, layout.text)
            pair_text = None if layout.text_pair is None else _text(record, layout.text_pair)
            label = _label(record, layout, task) if has_labels else None
        except _Bad as bad:
            report(BadRow(record.line, bad.column, bad.reason))
            continue
        row_id = record.cells.get(str(layout.id)) if layout.id is not None else None
        ids.append(str(row_id).strip() if row_id is not None else str(position))
        texts.append(text)
        pair_texts.append(pair_text)
        labels.append(label)
    if not ids:
        raise UserError(f"{path}: no rows" + (f" ({len(skipped)} bad ones were skipped)" if skipped else ""))
    dtype = np.int64 if task.type == "classification" else np.float32
    return Rows(
        path=path,
        ids=ids,
        texts=texts,
        pair_texts=None if layout.text_pair is None else [str(text) for text in pair_texts],
        labels=np.array(labels, dtype=dtype) if has_labels else None,
        skipped=skipped,
    )


def _share(rows: int, fraction: float) -> np.ndarray:
    """int64, ascending: the row numbers of a share of the rows, at least one; a smaller share is a part of a larger."""
    drawn = np.random.default_rng(0).permutation(rows)[: max(1, round(fraction * rows))]
    return np.sort(drawn)


class _Bad(Exception):
    def __init__(self, column: str | int, reason: str) -> None:
        self.column = str(column)
        self.reason = reason


def _names(header: list[str]) -> set[str]:
    return {*header, *map(str, range(len(header)))}


def _text(record: Record, column: str | int) -> str:
    value = record.cells.get(str(column))
    if value is None or not str(value).strip():
        raise _Bad(column, "expected a text, found none")
    return " ".join(str(value).split())  # stray spaces carry no meaning for a BERT tokenizer


def _label(record: Record, layout: Layout, task: TaskConfig) -> float | int:
    value = record.cells.get(str(layout.label))
    shown = "nothing" if value is None or str(value).strip() == "" else quoted(str(value))
    if task.type == "regression":
        assert task.range is not None  # checked by the config
        low, high = task.range
        number = _number(value)
        if number is None or not low <= number <= high:
            raise _Bad(layout.label, f"expected a number from {low:g} to {high:g}, found {shown}")
        return number
    classes = task.num_labels if task.type == "classification" else 2
    assert classes is not None  # checked by the config
    names = {name: index for index, name in enumerate(task.label_names)} if task.label_names else layout.labels
    if names and isinstance(value, str) and value.strip() in names:
        return names[value.strip()]
    number = _number(value)
    if number is None or number != int(number) or not 0 <= number < classes:
        expected = f"one of {listed(names, 12)}" if names else f"a class from 0 to {classes - 1}"
        raise _Bad(layout.label, f"expected {expected}, found {shown}")
    return int(number)


def _number(value: object) -> float | None:
    try:
        number = float(str(value).strip())
    except ValueError:
        return None
    return number if math.isfinite(number) else None
