"""Reading and tokenisation of rows with labels of their own: a class, a number or a set of labels.

They are the rows of types classification, binary, regression and multilabel.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from fastmtl.config import TaskConfig
from fastmtl.data.cells import cell_of, repeated_ids, text_of
from fastmtl.data.columns import (
    check_columns,
    check_undecided_quotes,
    indicators,
    looks_like_row,
    names_columns,
    uses_quotes,
)
from fastmtl.data.encode import encode_sequences
from fastmtl.data.formats import FORMATS, find_layout
from fastmtl.data.label_sets import label_reader
from fastmtl.data.labels import BadCell
from fastmtl.data.places import Place
from fastmtl.data.records import OnBadRow, open_source
from fastmtl.data.rows import Rows
from fastmtl.data.text_column import TextBuilder, row_numbers
from fastmtl.data.types.spec import Arrays, DataType
from fastmtl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read(place: Place, task: TaskConfig, bad: OnBadRow, *, require_labels: bool, numbers: Iterator[int]) -> Rows:
    """Return the rows of one place; see `ReadRows`."""
    files = task.data
    source = open_source(place, partial(uses_quotes, files), partial(names_columns, place, task), bad)
    columns = {str(role): column for role, column in files.columns.items() if not isinstance(column, list)}
    if task.type == "multilabel":
        columns = {**{role: role for role in ("id", "text") if role in source.header}, **columns}
    layout = dataclasses.replace(
        find_layout(files.format, source.header, columns, str(place)), indicators=indicators(files)
    )
    check_columns(place, source, layout, files, require_labels=require_labels)
    labels_of = label_reader(task, layout) if require_labels else None
    undecided = source.delimiter is not None and files.quotes is None and not uses_quotes(files, source.delimiter)

    dtype: type = np.int64 if task.type == "classification" else np.float32
    ids, texts, pair_texts = TextBuilder(), TextBuilder(), TextBuilder()
    numbered = array("q")
    lines: array[Any] = array("q")  # the lines of tables are numbers
    labels: array[Any] = array("q" if dtype is np.int64 else "f")
    for record, number in zip(source.records(partial(looks_like_row, source, layout, task)), numbers, strict=False):
        try:
            text = text_of(record, layout.text)
            pair_text = None if layout.text_pair is None else text_of(record, layout.text_pair)
            label = None if labels_of is None else labels_of.read(record)
            row_id = "" if layout.id is None else cell_of(record, layout.id)
        except BadCell as cell:
            bad(cell.row(record.line))
            continue
        if undecided:
            check_undecided_quotes(place, record, (layout.text, layout.text_pair))
        numbered.append(number)
        texts.append(text)
        if layout.id is not None:
            ids.append(row_id or str(number))
            lines.append(record.line)
        if pair_text is not None:
            pair_texts.append(pair_text)
        if label is not None:
            labels.extend(label if isinstance(label, list) else [label])
    known = row_numbers(numbered) if layout.id is None else ids.done()
    return Rows(
        path=place,
        ids=known,
        texts=texts.done(),
        pair_texts=None if layout.text_pair is None else pair_texts.done(),
        labels=None if labels_of is None else np.array(labels, dtype=dtype).reshape(len(numbered), *labels_of.shape),
        notes=[] if layout.id is None else repeated_ids(place, known, lines),
    )


def encode(rows: Rows, tokenizer: PreTrainedTokenizerBase, task: TaskConfig, max_length: int) -> tuple[Arrays, int]:
    """Tokenise each row as one sequence, or as two with `pairs: bi`; see `Encode`."""
    if task.pairs == "bi":
        if rows.pair_texts is None:
            raise UserError(f"{rows.path}: pairs: bi needs two texts per row, the file has one; leave `pairs` out")
        texts = [text for pair in zip(rows.texts, rows.pair_texts, strict=True) for text in pair]
        arrays, long = encode_sequences(texts, None, tokenizer, max_length, rows.path)
        return arrays, len({index // 2 for index in long})
    arrays, long = encode_sequences(rows.texts, rows.pair_texts, tokenizer, max_length, rows.path)
    return arrays, len(long)


def label(
    rows: Rows, arrays: Mapping[str, np.ndarray], task: TaskConfig
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return the rows' labels, and one loss term per row; see `Label`."""
    return rows.labels, None


SINGLE = DataType(read, encode, label, lambda task: [task.pairs == "bi"], formats=tuple(FORMATS))
