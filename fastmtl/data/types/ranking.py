"""Reading and tokenisation of rankings: queries with graded candidates."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from fastmtl.config import TaskConfig
from fastmtl.data.candidates import (
    Column,
    RowsBuilder,
    columns_of,
    encode_candidates,
    labels_as_they_are,
    offsets_of,
    open_table,
    records_of,
    texts_of,
)
from fastmtl.data.cells import cell_of, text_of
from fastmtl.data.labels import CELLS, BadCell
from fastmtl.data.places import Place
from fastmtl.data.records import OnBadRow, Record, Source
from fastmtl.data.rows import Items, Rows
from fastmtl.data.text_column import TextBuilder, taken
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
    columns = columns_of(place, source, task, roles)
    group_column, text_column = columns["group"][0], columns["text"][0]
    known: dict[str, int] = {}  # the number of each group
    texts, candidates = TextBuilder(), TextBuilder()
    hashes, lines = array("q"), array("q")  # of each group's text, and the line where the group begins
    groups, grades = array("q"), array("f")
    for record in records_of(place, source, task, columns):
        try:
            group = cell_of(record, group_column)
            if not group:
                raise BadCell(group_column, "expected the id of a group, found none")
            query, candidate = text_of(record, text_column), text_of(record, columns["text_pair"][0])
            grade = grade_of(record, columns["label"][0], task) if require_labels else 0.0
            number = known.get(group)
            if number is not None and hashes[number] != hash(query):
                wanted = f"the text that group {quoted(group)} has in line {lines[number]}"
                raise BadCell(text_column, f"expected {wanted}, found {quoted(query)}")
        except BadCell as cell:
            bad(cell.row(record.line))
            continue
        if number is None:
            number = known[group] = len(known)
            texts.append(query)
            hashes.append(hash(query))
            lines.append(int(record.line))
        candidates.append(candidate)
        groups.append(number)
        grades.append(grade)
    number_of_group = np.array(groups, dtype=np.int64)
    order = np.argsort(number_of_group, kind="stable")
    items = taken(candidates.done(), order) if (np.diff(number_of_group) < 0).any() else candidates.done()
    rows = Rows(
        path=place,
        ids=list(known),
        texts=texts.done(),
        pair_texts=None,
        labels=None,
        items=Items(items, offsets_of(np.bincount(number_of_group, minlength=len(known))), labelled=True),
    )
    return _graded(rows, np.array(grades, dtype=np.float32)[order], place) if require_labels else rows


def _read_queries(
    place: Place, source: Source, task: TaskConfig, bad: OnBadRow, *, require_labels: bool, numbers: Iterator[int]
) -> Rows:
    """Read rows with all candidates of a query.

    With a column of labels it holds the list of their grades. Without, the candidates of the first
    column have grade 1 and the others grade 0.
    """
    graded = "label" in task.data.columns
    roles = ("id", "text", "choices", *(["label"] if graded and require_labels else []))
    columns = columns_of(place, source, task, roles)
    if require_labels and not graded and len(columns["choices"]) == 1:
        raise UserError(
            f"{place}: columns.choices names one column, so nothing says which candidates are good: name a column with "
            "the list of their grades as columns.label, or several columns, that of the good ones first"
        )
    rows, grades = RowsBuilder(), array("f")
    for record, number in zip(records_of(place, source, task, columns), numbers, strict=False):
        try:
            found = texts_of(record, columns["choices"])
            if not found[0]:
                raise BadCell(columns["choices"][0], "expected a text or a list of texts, found none")
            candidates = [text for column in found for text in column]
            own = [1.0] * len(found[0]) + [0.0] * (len(candidates) - len(found[0]))
            if "label" in columns:
                own = _grades(record, columns["label"][0], len(candidates), task)
            text = text_of(record, columns["text"][0])
            row_id = cell_of(record, columns["id"][0]) if "id" in columns else None
        except BadCell as cell:
            bad(cell.row(record.line))
            continue
        rows.add(record, row_id, number, text, candidates)
        grades.extend(own)
    result = rows.done(place, has_ids="id" in columns, labelled=True)
    return _graded(result, np.array(grades, dtype=np.float32), place) if require_labels else result


def _graded(rows: Rows, grades: np.ndarray, place: Place) -> Rows:
    """Return the rows with grades, float32 [candidates]."""
    assert rows.items is not None
    starts = rows.items.offsets[:-1]
    notes = list(rows.notes)
    equal = 0
    if len(rows):
        equal = int((np.maximum.reduceat(grades, starts) == np.minimum.reduceat(grades, starts)).sum())
    if equal:
        notes.append(f"{place.name}: in {equal} of {len(rows)} groups all grades are equal, so they teach no order")
    return dataclasses.replace(rows, labels=grades, notes=notes)


def _grades(record: Record, column: Column, count: int, task: TaskConfig) -> list[float]:
    values = record.cells.get(column)
    if not isinstance(values, list | tuple) or len(values) != count:
        found = f"{len(values)}" if isinstance(values, list | tuple) else quoted(values)
        reason = f"expected a list of {count} grades, one for each candidate, found {found}"
        raise BadCell(column, reason, missing=values is None)
    return [_grade(value, column, task) for value in values]


def grade_of(record: Record, column: Column, task: TaskConfig) -> float:
    """Return the grade in a cell. Raises BadCell unless it is a number from 0 on."""
    return _grade(record.cells.get(column), column, task)


def _grade(value: object, column: Column, task: TaskConfig) -> float:
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
