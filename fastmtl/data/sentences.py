"""Sentences of words with tags, in CoNLL columns, CoNLL-U, JSON lines and Parquet files."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from fastmtl.config import TaskConfig
from fastmtl.data.cells import cell_of
from fastmtl.data.file_bytes import Content, ending, find_bad_byte
from fastmtl.data.labels import BadCell
from fastmtl.data.places import Place, Table
from fastmtl.data.records import OnBadRow, Record, Source, open_source
from fastmtl.errors import UserError, listed, quoted, shortened

CONLLU = ("id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")
WORDS, TAGS = ("words", "tokens"), ("tags", "labels")  # default names in JSON lines and Parquet


@dataclass(frozen=True)
class Sentence:
    """The words of a sentence as its file has them.

    lines: the line of each word. tags: a cell per word; None if the labels are not read. columns:
    names or numbers of the columns of the words and of the tags, for messages.
    """

    id: str | None
    lines: list[int]
    words: list[str]
    tags: list[object] | None
    columns: tuple[str, str]


def read_sentences(place: Place, task: TaskConfig, bad: OnBadRow, *, require_labels: bool) -> Iterator[Sentence | None]:
    """Yield the sentences of a place, by `data.format` or, for format table, the file's suffix.

    bad: called for a sentence whose words cannot be read, which becomes a None. require_labels:
    whether tags are read. Raises UserError for a file that cannot be read at all.
    """
    name = task.data.format
    if isinstance(place, Table):
        if name != "table":
            raise UserError(f"{place}: data.format is {name}, but this is a table with columns; leave it out")
        return _records(place, task, bad, require_labels=require_labels)
    if name == "table" and ending(place) in (".conll", ".conllu"):
        name = ending(place)[1:]
    if name == "table":
        return _records(place, task, bad, require_labels=require_labels)
    return _lines(place, task, bad, unified=name == "conllu", require_labels=require_labels)


def _lines(
    path: Path, task: TaskConfig, bad: OnBadRow, *, unified: bool, require_labels: bool
) -> Iterator[Sentence | None]:
    """Yield the sentences of a file with one word per line. unified: CoNLL-U."""
    if "id" in task.data.columns:
        raise UserError(f"{path}: columns.id: a sentence has its id in a comment, `# sent_id = ...`: leave it out")
    content = Content(path)
    reader = _UnifiedLine(task) if unified else _PlainLine(path, task, content)
    if require_labels and reader.label >= reader.width:
        raise UserError(
            f"{path}: no column {reader.label} for label; the file has {reader.width} columns, with numbers from 0"
        )
    columns = (reader.name(reader.words), reader.name(reader.label))
    for block in _blocks(content, reader, bad):
        if block is None:
            yield None
            continue
        sentence_id, lines = block
        words = [cells[reader.words] for _, cells in lines]
        tags: list[object] | None = [cells[reader.label] for _, cells in lines] if require_labels else None
        yield Sentence(sentence_id, [number for number, _ in lines], words, tags, columns)


def _blocks(
    content: Content, reader: _PlainLine | _UnifiedLine, bad: OnBadRow
) -> Iterator[tuple[str | None, list[tuple[int, list[str]]]] | None]:
    """Yield the id of each sentence, and the number and the cells of each line with a word.

    A sentence with a bad line becomes a None.
    """
    found: list[tuple[int, list[str]]] = []
    sentence_id: str | None = None
    broken, before = False, 0
    for number, text in chain(content.lines(), [(sys.maxsize, "")]):
        if number > before + 1 or not text.strip():  # `Content.lines` leaves blank lines out
            if broken:
                yield None
            elif found:
                yield sentence_id, found
            found, sentence_id, broken = [], None, False
        before = number
        if broken or not text.strip():
            continue
        try:
            bad_byte = find_bad_byte(text)
            if bad_byte is not None:
                raise BadCell(f"byte {bad_byte[0]}", bad_byte[1])
            if reader.is_comment(text, begun=bool(found)):
                named = re.match(r"#\s*sent_id\s*=\s*(.*)", text)
                sentence_id = named[1].strip() if named else sentence_id
                continue
            cells = reader.cells(text)
        except BadCell as cell:
            bad(cell.row(number))
            broken = True
            continue
        if cells is not None:
            found.append((number, cells))


class _PlainLine:
    """A line of CoNLL columns: cells between tabs, or between spaces.

    A line of another number of columns is a mistake. Words: column 0. Tags: the last column.
    """

    def __init__(self, path: Path, task: TaskConfig, content: Content) -> None:
        texts = (text for _, text in content.lines() if text.strip())
        first = next((text for text in texts if not text.startswith(("#", "-DOCSTART-"))), None)
        if first is None:
            raise UserError(f"{path}: no line with a word")
        self._tabs = "\t" in first
        self.width = len(self._split(first))
        columns = {"words": 0, "label": self.width - 1}
        for role, column in task.data.columns.items():
            if not isinstance(column, int):
                raise UserError(f"{path}: columns.{role}: CoNLL columns have no names: give a number from 0")
            columns[role] = column
        self.words, self.label = columns["words"], columns["label"]
        if self.words >= self.width:
            raise UserError(
                f"{path}: no column {self.words} for words; the file has {self.width} columns, with numbers from 0"
            )
        if self.label == self.words:
            self.label = self.width  # a file of words only
        self._tags = {*(task.label_names or ()), "_", ""}

    def name(self, column: int) -> str:
        return str(column)

    def _split(self, text: str) -> list[str]:
        return text.split("\t") if self._tabs else re.split(r"[ \t]+", text.strip(" \t"))

    def is_comment(self, text: str, *, begun: bool) -> bool:
        """Return whether a line is a comment, which stands before a sentence, or begins a document.

        `#` may also be a word: a line is one if it has as many columns as others, and a tag.
        """
        if re.match(r"-DOCSTART-\s*", text):
            return True
        if begun or not re.match(r"#[ \t]", text):
            return False
        cells = self._split(text)
        known = self.label >= self.width or (len(cells) > self.label and cells[self.label].strip() in self._tags)
        return len(cells) != self.width or not known

    def cells(self, text: str) -> list[str] | None:
        cells = self._split(text)
        if len(cells) != self.width:
            column = len(cells) if len(cells) < self.width else self.width
            raise BadCell(column, f"expected {self.width} columns, found {len(cells)}")
        return cells


class _UnifiedLine:
    """A line of CoNLL-U. Words: FORM. Tags: UPOS. Multiword ranges and empty nodes are skipped."""

    width = len(CONLLU)

    def __init__(self, task: TaskConfig) -> None:
        numbers = {"words": CONLLU.index("form"), "label": CONLLU.index("upos")}
        for role, column in task.data.columns.items():
            number = CONLLU.index(column.lower()) if isinstance(column, str) and column.lower() in CONLLU else column
            if not isinstance(number, int) or number >= self.width:
                raise UserError(
                    f"data.columns.{role}: {quoted(column)} is no column of CoNLL-U, which has {listed(CONLLU)}"
                )
            numbers[role] = number
        self.words, self.label = numbers["words"], numbers["label"]

    def name(self, column: int) -> str:
        return CONLLU[column]

    def is_comment(self, text: str, *, begun: bool) -> bool:
        return text.startswith("#")

    def cells(self, text: str) -> list[str] | None:
        cells = text.split("\t")
        if len(cells) != self.width:
            column = CONLLU[len(cells)] if len(cells) < self.width else str(self.width + 1)
            raise BadCell(column, f"expected {self.width} columns between tabs, found {len(cells)}")
        if re.fullmatch(r"\d+[-.]\d+", cells[0].strip()):
            return None
        if not cells[0].strip().isdecimal():
            raise BadCell("id", f"expected the number of a word, found {quoted(cells[0])}")
        return cells


def _records(place: Place, task: TaskConfig, bad: OnBadRow, *, require_labels: bool) -> Iterator[Sentence | None]:
    """Yield the sentences of a file with a list of words, and a list of tags, per row."""
    source = open_source(place, lambda _: False, lambda _: True, bad)
    if source.delimiter is not None:
        raise UserError(
            f"{place}: a tokens task reads JSON lines, Parquet, CoNLL columns and CoNLL-U: for the last two set "
            "data.format to conll or conllu, or give the file the suffix .conll or .conllu"
        )
    words = _column(place, source, task, "words", WORDS)
    label = _column(place, source, task, "label", TAGS) if require_labels else None
    row_id = task.data.columns.get("id", "id")
    for record in source.records(lambda _: False):
        try:
            texts = [_word(record, words, value) for value in _list(record, words)]
            if not texts:
                raise BadCell(words, "expected a list of words, found an empty one")
            tags = None if label is None else _list(record, label, missing=record.cells.get(label) is None)
            if tags is not None and len(tags) != len(texts):
                raise BadCell(str(label), f"{len(texts)} words, but {len(tags)} tags")
            found = cell_of(record, row_id) if isinstance(row_id, str) and row_id in record.cells else ""
        except BadCell as cell:
            bad(cell.row(record.line))
            yield None
            continue
        yield Sentence(found or None, [record.line] * len(texts), texts, tags, (words, str(label)))


def _column(place: Place, source: Source, task: TaskConfig, role: str, names: tuple[str, ...]) -> str:
    given = task.data.columns.get(role)  # type: ignore[call-overload]
    found = given if given in source.header else None
    if given is None:
        found = next((name for name in names if name in source.header), None)
    if not isinstance(found, str):
        what = f"column '{shortened(str(given))}'" if given is not None else f"column {' or '.join(names)}"
        raise UserError(f"{place}: no {what} for {role}; the file has {listed(source.header)}")
    return found


def _list(record: Record, column: str, *, missing: bool = False) -> list[object]:
    value = record.cells.get(column)
    if not isinstance(value, list):
        raise BadCell(column, f"expected a list with a value per word, found {quoted(value)}", missing=missing)
    return value


def _word(record: Record, column: str, value: object) -> str:
    return cell_of(Record(record.line, {column: value}), column)
