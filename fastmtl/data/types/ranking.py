"""Reading and tokenisation of rankings: queries with graded candidates."""

from __future__ import annotations

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
from fastmtl.data.records import OnBadRow, Record, Source
from fastmtl.data.rows import Rows
from fastmtl.data.types.spec import Arrays, DataType
from fastmtl.errors import UserError, quoted, shortened
from fastmtl.files.label_text import as_label, as_number

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LARGEST_EXPONENT = 30  # of the gains 2^grade - 1


def read(place: Place, task: TaskConfig, bad: OnBadRow, *, require_labels: bool, numbers: Iterator[int]) -> Rows:
    """Return the queries of one place; see `ReadRows`.

    A row of the file is a candidate; with a column `choices` it is a query with all candidates.
    """
    source = open_table(place, task, bad)
    if "choices" in task.data.columns:
        return _read_queries(place, source, task, bad, require_labels=require_labels, numbers=numbers)
    return _read_candidates(place, source, task, bad, require_labels=require_labels)


def _read_candidates(place: Place, source: Source, task: TaskConfig, bad: OnBadRow, *, require_labels: bool) -> Rows:
    """Collect the candidates of each group, in the order of the file."""
    roles = ("group", "text", "text_pair", *(["label"] if require_labels else []))
    columns = {role: found[0] for role, found in columns_of(place, source, task, roles).items()}
    queries: dict[str, tuple[str, int]] = {}  # the text of each group, and the line where it begins
    candidates: dict[str, list[str]] = {}
    grades: dict[str, list[float]] = {}
    for record in records_of(place, source, task, [columns["text"], columns["text_pair"]]):
        try:
            group = cell_of(record, columns["group"])
            if not group:
                raise BadCell(columns["group"], "expected the id of a group, found none")
            query, candidate = text_of(record, columns["text"]), text_of(record, columns["text_pair"])
            grade = grade_of(record.cells.get(columns["label"]), columns["label"], task) if require_labels else 0.0
            first, line = queries.get(group, (query, 0))
            if query != first:
                wanted = f"{quoted(first)}, the text of group {quoted(group)} in line {line}"
                raise BadCell(columns["text"], f"expected {wanted}, found {quoted(query)}")
        except BadCell as cell:
            bad(cell.row(record.line))
            continue
        queries.setdefault(group, (query, record.line))
        candidates.setdefault(group, []).append(candidate)
        grades.setdefault(group, []).append(grade)
    texts = [query for query, _ in queries.values()]
    return _rows(place, list(queries), texts, list(candidates.values()), list(grades.values()), [], require_labels)


def _read_queries(
    place: Place, source: Source, task: TaskConfig, bad: OnBadRow, *, require_labels: bool, numbers: Iterator[int]
) -> Rows:
    """Read rows with all candidates of a query.

    With a column of labels it holds the list of their grades. Without, the candidates of the first
    column have grade 1 and the others grade 0.
    """
    graded = "label" in task.data.columns
    columns = columns_of(
        place, source, task, ("id", "text", "choices", *(["label"] if graded and require_labels else []))
    )
    if require_labels and not graded and len(columns["choices"]) == 1:
        raise UserError(
            f"{place}: columns.choices names one column, so nothing says which candidates are good: name a column with "
            "the list of their grades as columns.label, or several columns, that of the good ones first"
        )
    ids, texts, candidates, grades, lines = [], [], [], [], []
    of_texts = [*columns["text"], *columns["choices"]]
    for record, number in zip(records_of(place, source, task, of_texts), numbers, strict=False):
        try:
            found = texts_of(record, columns["choices"])
            if not found[0]:
                raise BadCell(columns["choices"][0], "expected a text or a list of texts, found none")
            count = sum(map(len, found))
            if not require_labels:
                own = [0.0] * count
            elif graded:
                own = _grades(record, columns["label"][0], count, task)
            else:
                own = [1.0] * len(found[0]) + [0.0] * (count - len(found[0]))
            text = text_of(record, columns["text"][0])
            row_id = cell_of(record, columns["id"][0]) if "id" in columns else ""
        except BadCell as cell:
            bad(cell.row(record.line))
            continue
        ids.append(row_id or str(number))
        texts.append(text)
        candidates.append([text for column in found for text in column])
        grades.append(own)
        lines.append(record.line)
    return _rows(place, ids, texts, candidates, grades, repeated_ids(place, ids, lines), require_labels)


def _rows(
    place: Place,
    ids: list[str],
    texts: list[str],
    candidates: list[list[str]],
    grades: list[list[float]],
    notes: list[str],
    labelled: bool,
) -> Rows:
    equal = sum(len(set(own)) < 2 for own in grades)
    if labelled and equal:
        notes = [*notes, f"{place.name}: in {equal} of {len(ids)} groups all grades are equal, so they teach no order"]
    return Rows(
        path=place,
        ids=ids,
        texts=texts,
        pair_texts=None,
        labels=np.array([grade for own in grades for grade in own], dtype=np.float32) if labelled else None,
        notes=notes,
        items=items_of(candidates, labelled=True),
    )


def _grades(record: Record, column: Column, count: int, task: TaskConfig) -> list[float]:
    values = record.cells.get(column)
    if not isinstance(values, list | tuple) or len(values) != count:
        found = f"{len(values)}" if isinstance(values, list | tuple) else quoted(values)
        reason = f"expected a list of {count} grades, one for each candidate, found {found}"
        raise BadCell(column, reason, missing=values is None)
    return [grade_of(value, column, task) for value in values]


def grade_of(value: object, column: Column, task: TaskConfig) -> float:
    """Return a grade. Raises BadCell unless it is a number from 0 on."""
    number = as_number(as_label(value)) if isinstance(value, CELLS) and not isinstance(value, bool) else None
    most = LARGEST_EXPONENT if task.ranking.gains == "exponential" else float(np.finfo(np.float32).max)
    if number is None or not 0 <= number <= most:
        limit = f" to {most}, as ranking.gains is exponential" if task.ranking.gains == "exponential" else " on"
        missing = not as_label(value)
        shown = "nothing" if missing else shortened(quoted(value))
        raise BadCell(column, f"expected a grade, a number from 0{limit}, found {shown}", missing=missing)
    return number


def encode(rows: Rows, tokenizer: PreTrainedTokenizerBase, task: TaskConfig, max_length: int) -> tuple[Arrays, int]:
    """Tokenise each candidate with its query, or with `pairs: bi` queries and candidates apart."""
    return encode_candidates(rows, tokenizer, max_length, apart=task.pairs == "bi")


RANKING = DataType(read, encode, labels_as_they_are, lambda task: [task.pairs == "bi"])
