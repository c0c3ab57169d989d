"""Reading of a task's files into rows. Every cell is checked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from fastmtl.config import DataConfig, TaskConfig
from fastmtl.data.columns import check_columns, check_undecided_quotes, looks_like_row, names_columns, uses_quotes
from fastmtl.data.formats import check_format, find_layout
from fastmtl.data.labels import CELLS, BadCell, Labels
from fastmtl.data.records import BadRow, Record, open_source
from fastmtl.errors import UserError, quoted
from fastmtl.files.user_path import user_path


@dataclass(frozen=True)
class Rows:
    """n rows of a task.

    labels: int64 [n] (classification) or float32 [n] (binary: 0 or 1; regression); None for files
    without labels. skipped: the bad rows that were left out (`on_bad_row: skip`). notes: messages
    for the user about rows that were left out or changed for other reasons.
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
        """Return the rows at the positions `chosen`, in that order."""
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
    """Return the rows of a task's train, dev or test file. Relative paths start at `data.dir`.

    Of the training rows, a random share `data.fraction` is kept, the same rows in every run, and of
    these the first `limit`. Raises UserError where `read_file` raises it.
    """
    name = getattr(task.data, split)
    if name is None:
        raise UserError(f"the task has no {split} file: set tasks.<name>.data.{split}")
    path = user_path(data.dir or ".") / name
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
    """Return the rows of one file in the task's format.

    on_bad_row: "skip" leaves bad rows out. require_labels: whether every row needs a label. If
    False, the label column is not read, so it may be missing, empty or -1.

    Raises UserError naming file, line and column for a bad row (missing text, label not a number or
    out of range, wrong number of columns, not UTF-8, wrong quotes) unless on_bad_row is "skip",
    and naming the file if it has no rows or lacks a required column.
    """
    skipped: list[BadRow] = []

    def report(bad: BadRow) -> None:
        if on_bad_row == "error":
            raise UserError(f"{path}, {bad}. Fix the row, or set data.on_bad_row=skip to leave such rows out.")
        skipped.append(bad)

    files = task.data
    check_format(files.format)
    source = open_source(path, partial(uses_quotes, files), partial(names_columns, path, task), report)
    layout = find_layout(files.format, source.header, {str(k): v for k, v in files.columns.items()}, str(path))
    check_columns(path, source, layout, files, require_labels=require_labels)
    labels_of = Labels(task, layout) if require_labels else None
    undecided = source.delimiter is not None and files.quotes is None and not uses_quotes(files, source.delimiter)

    ids, texts, pair_texts, labels, lines = [], [], [], [], []
    for position, record in enumerate(source.records(partial(looks_like_row, source, layout, task))):
        try:
            text = _text(record, layout.text)
            pair_text = None if layout.text_pair is None else _text(record, layout.text_pair)
            label = None if labels_of is None else labels_of.read(record)
            row_id = None if layout.id is None else _cell(record, layout.id)
        except BadCell as bad:
            report(BadRow(record.line, str(bad.column), bad.reason))
            continue
        if undecided:
            check_undecided_quotes(path, record, layout)
        ids.append(row_id or str(position))
        texts.append(text)
        pair_texts.append(pair_text)
        labels.append(label)
        lines.append(record.line)
    if not ids:
        raise UserError(f"{path}: no rows" + (f" ({len(skipped)} bad ones were skipped)" if skipped else ""))
    dtype = np.int64 if task.type == "classification" else np.float32
    return Rows(
        path=path,
        ids=ids,
        texts=texts,
        pair_texts=None if layout.text_pair is None else [str(text) for text in pair_texts],
        labels=None if labels_of is None else np.array(labels, dtype=dtype),
        skipped=skipped,
        notes=_repeated_ids(path, ids, lines),
    )


def _repeated_ids(path: Path, ids: list[str], lines: list[int]) -> list[str]:
    first: dict[str, int] = {}
    repeated = [
        (row_id, line) for row_id, line in zip(ids, lines, strict=True) if first.setdefault(row_id, line) != line
    ]
    if not repeated:
        return []
    row_id, line = repeated[0]
    return [
        f"{path.name}: {len(repeated)} rows have an id that an earlier row has too, the first is {quoted(row_id)} in "
        f"line {line} and line {first[row_id]}"
    ]


def _share(rows: int, fraction: float) -> np.ndarray:
    """Return the numbers of randomly chosen rows, int64, ascending: round(fraction * rows) of them.

    At least one row is chosen. The choice is the same in every run. The rows of a smaller fraction
    are among those of a larger one.
    """
    drawn = np.random.default_rng(0).permutation(rows)[: max(1, round(fraction * rows))]
    return np.sort(drawn)


def _text(record: Record, column: str | int) -> str:
    text = _cell(record, column)
    if not text:
        raise BadCell(column, "expected a text, found none")
    return " ".join(text.split())  # a BERT tokenizer treats several spaces as one


def _cell(record: Record, column: str | int) -> str:
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
