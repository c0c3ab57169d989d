"""Reading and tokenisation of questions with a context: the answer is a part of the context.

The texts of the rows are the questions, their second texts the contexts with all their spaces, as
answers are given by characters. Examples are the windows of data/windows.py, with a unit per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from fastmtl.config import TaskConfig
from fastmtl.data.candidates import LISTS, open_table
from fastmtl.data.cells import cell_of, content_of, repeated_ids, text_of
from fastmtl.data.columns import check_column, check_undecided_quotes, uses_quotes
from fastmtl.data.labels import BadCell
from fastmtl.data.places import Place, Table
from fastmtl.data.records import OnBadRow, Record, Source
from fastmtl.data.rows import Answers, Rows
from fastmtl.data.squad import open_squad
from fastmtl.data.text_column import TextBuilder
from fastmtl.data.types.spec import Arrays, DataType
from fastmtl.data.windows import windows
from fastmtl.errors import UserError, quoted
from fastmtl.files.label_text import as_label, as_number

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Columns = dict[str, str | int]
# The columns of SQuAD at Hugging Face; those of a SQuAD file get the same names.
SQUAD: Columns = {"id": "id", "text": "question", "text_pair": "context", "answers": "answers"}


def read(place: Place, task: TaskConfig, bad: OnBadRow, *, require_labels: bool, numbers: Iterator[int]) -> Rows:
    """Return the rows of one place; see `ReadRows`."""
    files = task.data
    source = None if isinstance(place, Table) else open_squad(place, bad, certain=files.format == "squad")
    columns = SQUAD
    if source is None:
        source = open_table(place, task, bad)
        columns = _columns(place, task, source)
        for role, column in columns.items():
            if require_labels or not role.startswith("answer"):
                check_column(place, source, role, column)
    undecided = source.delimiter is not None and files.quotes is None and not uses_quotes(files, source.delimiter)

    ids, questions, contexts = TextBuilder(), TextBuilder(), TextBuilder()
    lines: list[int | str] = []
    answers: list[Answers] = []
    for record, number in zip(source.records(partial(_looks_like_row, source, columns)), numbers, strict=False):
        try:
            question = text_of(record, columns["text"])
            context = content_of(record, columns["text_pair"])
            if not context.strip():
                raise BadCell(columns["text_pair"], "expected a text, found none")
            found = _answers(record, columns, context, task) if require_labels else []
            row_id = cell_of(record, columns["id"]) if "id" in columns else ""
        except BadCell as cell:
            bad(cell.row(record.place))
            continue
        if undecided:
            check_undecided_quotes(place, record, [columns["text"], columns["text_pair"]])
        ids.append(row_id or str(number))
        questions.append(question)
        contexts.append(context)
        answers.append(found)
        lines.append(record.place)
    row_ids = ids.done()
    return Rows(
        path=place,
        ids=row_ids,
        texts=questions.done(),
        pair_texts=contexts.done(),
        labels=None,
        notes=repeated_ids(place, row_ids, lines),
        answers=answers if require_labels else None,
    )


def _columns(place: Place, task: TaskConfig, source: Source) -> Columns:
    """Return the columns of a table by role.

    Without `data.columns` they have the names of the roles, or SQuAD's with format squad. Raises
    UserError for an answer that is named twice or by half.
    """
    given = {str(role): column for role, column in task.data.columns.items() if not isinstance(column, list)}
    defaults: Columns = SQUAD if task.data.format == "squad" else {role: role for role in SQUAD}
    named = {role: column for role, column in defaults.items() if role != "id" or column in source.header}
    if "answer" in given or "answer_start" in given:
        del named["answers"]
    if ("answer" in given) != ("answer_start" in given) or {"answer", "answers"} <= given.keys():
        raise UserError(f"{place}: data.columns: give answers, or answer and answer_start; it has {given}")
    return {**named, **given}


def _looks_like_row(source: Source, columns: Columns, cells: list[str]) -> bool:
    """Return whether a line in a quoted cell has as many cells as a row, and a number as start."""
    start = columns.get("answer_start")
    at = source.header.index(start) if isinstance(start, str) and start in source.header else start
    if not isinstance(at, int) or at >= len(cells) or len(cells) != len(source.header):
        return False
    return as_number(as_label(cells[at])) is not None


def _answers(record: Record, columns: Columns, context: str, task: TaskConfig) -> Answers:
    """Return the checked answers of a row. Raises BadCell."""
    if "answers" in columns:
        column = columns["answers"]
        if record.cells.get(column) is None:
            raise BadCell(column, "expected answers, found nothing", missing=True)
        pairs = _listed(record.cells.get(column), column)
        places = (column, column)
    else:
        places = (columns["answer_start"], columns["answer"])
        text, start = content_of(record, places[1]), as_label(record.cells.get(places[0]))
        pairs = [] if not text.strip() and start in ("", "-1") else [(as_number(start), text, start)]
    if not pairs and not task.span.unanswerable:
        reason = "there is no answer; span.unanswerable: true allows questions without one"
        raise BadCell(places[1], reason, missing=True)
    return [_checked(*pair, context, places) for pair in pairs]


def _listed(value: object, column: str | int) -> list[tuple[float | None, object, object]]:
    """Return (start, text, start as it is in the file) of each answer in a cell.

    value: {"text": [...], "answer_start": [...]}, or [{"text": ..., "answer_start": ...}, ...].
    """
    if isinstance(value, dict):
        texts, starts = value.get("text"), value.get("answer_start")
        if isinstance(texts, LISTS) and isinstance(starts, LISTS) and len(texts) == len(starts):
            value = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
    if not isinstance(value, LISTS) or not all(isinstance(one, dict) for one in value):
        raise BadCell(
            column,
            'expected answers as {"text": [...], "answer_start": [...]} or as a list of {"text", "answer_start"}, '
            f"found {quoted(value)}",
        )
    starts = [one.get("answer_start") for one in value]
    return [(as_number(as_label(start)), one.get("text"), start) for one, start in zip(value, starts, strict=True)]


def _checked(
    start: float | None, text: object, shown: object, context: str, columns: tuple[str | int, str | int]
) -> tuple[int, str]:
    """Return (start, text) of an answer that stands in the context. columns: of start and text."""
    if not isinstance(text, str) or not text.strip():
        raise BadCell(columns[1], f"expected the text of an answer, found {quoted(text) if text else 'none'}")
    if start is None or start != int(start) or not 0 <= start < len(context):
        raise BadCell(
            columns[0],
            f"expected the answer's place in the context, from 0 to {len(context) - 1}, found {quoted(shown)}",
        )
    first = int(start)
    if context[first : first + len(text)] != text:
        there = context[first : first + len(text)]
        elsewhere = context.find(text)
        hint = f"; it begins at {elsewhere}" if elsewhere >= 0 else ""
        raise BadCell(
            columns[1], f"expected the answer {quoted(text)} at character {first}, found {quoted(there)} there{hint}"
        )
    return first, text


def encode(rows: Rows, tokenizer: PreTrainedTokenizerBase, task: TaskConfig, max_length: int) -> tuple[Arrays, int]:
    """Tokenise questions and contexts into windows; see `Encode`."""
    assert rows.pair_texts is not None
    return windows(rows.texts, rows.pair_texts, tokenizer, task.span, max_length, rows.path)


def label(
    rows: Rows, arrays: Mapping[str, np.ndarray], task: TaskConfig
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return the first and last unit of the first answer in each window, int64 [n, 2].

    They are 0 in a window without the whole answer.
    """
    if rows.answers is None:
        return None, None
    wanted = np.array([_characters(answers) for answers in rows.answers], dtype=np.int64)[arrays["row_of"]]
    offsets, spans = arrays["unit_offsets"], arrays["unit_spans"]
    counts, begins = np.diff(offsets), offsets[:-1]
    start, stop = np.repeat(wanted, counts, axis=0).T
    place, inside = arrays["unit_places"], spans[:, 0] >= 0
    whole = np.logical_or.reduceat(inside & (spans[:, 0] <= start), begins)
    whole &= np.logical_or.reduceat(inside & (spans[:, 1] >= stop), begins) & (wanted[:, 0] >= 0)
    overlaps = inside & (spans[:, 0] < stop) & (spans[:, 1] > start)
    first = np.minimum.reduceat(np.where(overlaps, place, counts.max()), begins)
    last = np.maximum.reduceat(np.where(overlaps, place, -1), begins)
    found = whole & (first <= last)
    return np.where(found[:, None], np.stack([first, last], axis=1), 0).astype(np.int64), None


def _characters(answers: Sequence[tuple[int, str]]) -> tuple[int, int]:
    """Return the first character and the end of the first answer, without spaces around it."""
    if not answers:
        return -1, -1
    start, text = answers[0]
    return start + len(text) - len(text.lstrip()), start + len(text.rstrip())


SPAN = DataType(
    read,
    encode,
    label,
    lambda task: [task.span.stride, task.span.max_question],
    formats=("table", "squad"),
    cut="windows have a question cut to span.max_question tokens",
)
