"""The checked rows of a task's file."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fastmtl.data.places import Place
from fastmtl.data.records import BadRow
from fastmtl.data.text_column import joined, taken
from fastmtl.errors import UserError

# Answers to a question: (first character in the context, text) each. An empty list: no answer.
Answers = list[tuple[int, str]]


@dataclass(frozen=True)
class Items:
    """The parts of each row, one row after the other: the words of a sentence, or candidates.

    texts: the parts of all rows. offsets: int64 [n + 1]; row i has the parts
    texts[offsets[i]:offsets[i + 1]]. labelled: True if the rows' labels have one value per part.
    """

    texts: Sequence[str]
    offsets: np.ndarray
    labelled: bool

    @classmethod
    def join(cls, parts: Sequence[Items]) -> Items:
        """Return the parts of the rows of several places, one place after the other."""
        sizes = np.concatenate([np.diff(part.offsets) for part in parts])
        texts = joined([part.texts for part in parts])
        return cls(texts, np.concatenate([[0], np.cumsum(sizes)]), parts[0].labelled)

    def of(self, row: int) -> list[str]:
        """Return the parts of a row."""
        return list(self.texts[self.offsets[row] : self.offsets[row + 1]])

    def positions(self, chosen: np.ndarray) -> np.ndarray:
        """Return the positions of the parts of the rows `chosen`, int64, row by row."""
        return ranges(self.offsets[chosen], self.offsets[chosen + 1])


@dataclass(frozen=True)
class Rows:
    """n rows of a task.

    texts: the text, question or query of each row; for words the sentence. pair_texts: second
    texts or contexts. labels: by the task's type
        classification  int64 [n] class ids
        binary, regression  float32 [n]
        multilabel      float32 [n, C], 0 or 1
        tokens          int64 [words], tag ids; -100 for a word without a label
        choice          int64 [n], the number of the right text from 0
        ranking         float32 [candidates], grades
    None for files without labels and for type span, whose labels are in `answers`.
    path: the file or files, for messages. items: words or candidates. answers: those of each row.
    skipped: the bad rows that were left out (`on_bad_row: skip`). notes: messages for the user
    about rows that were left out or changed for other reasons. Texts and ids are lists or, for
    large files, columns in a temporary file (see fastmtl.data.text_column).
    """

    path: Place | str
    ids: Sequence[str]
    texts: Sequence[str]
    pair_texts: Sequence[str] | None
    labels: np.ndarray | None
    skipped: list[BadRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    items: Items | None = None
    answers: list[Answers] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def join(cls, parts: Sequence[Rows]) -> Rows:
        """Return the rows of several places of one task, one place after the other.

        Raises UserError if only some of them have second texts.
        """
        first = parts[0]
        if len(parts) == 1:
            return first
        for part in parts:
            if (part.pair_texts is None) != (first.pair_texts is None):
                one, two = (part, first) if part.pair_texts is None else (first, part)
                raise UserError(f"{one.path} has one text per row and {two.path} has two; a split has either")
        items = [part.items for part in parts if part.items is not None]
        labels = [part.labels for part in parts if part.labels is not None]
        return cls(
            path=f"{first.path} and {len(parts) - 1} more",
            ids=joined([part.ids for part in parts]),
            texts=joined([part.texts for part in parts]),
            pair_texts=None if first.pair_texts is None else joined([part.pair_texts or () for part in parts]),
            labels=np.concatenate(labels) if labels else None,
            skipped=[bad for part in parts for bad in part.skipped],
            notes=[note for part in parts for note in part.notes],
            items=Items.join(items) if items else None,
            answers=None if first.answers is None else [answers for part in parts for answers in (part.answers or ())],
        )

    def take(self, chosen: Sequence[int] | np.ndarray, note: str | None = None) -> Rows:
        """Return the rows at the positions `chosen`, in that order."""
        rows = np.asarray(chosen, dtype=np.int64)
        items, labels = self.items, self.labels
        positions = None if items is None else items.positions(rows)
        if items is not None and positions is not None:
            counts = np.diff(items.offsets)[rows]
            offsets = np.concatenate([[0], np.cumsum(counts)])
            items = Items(taken(items.texts, positions), offsets, items.labelled)
        if labels is not None:
            labels = labels[rows if items is None or not items.labelled else positions]
        return dataclasses.replace(
            self,
            ids=taken(self.ids, rows),
            texts=taken(self.texts, rows),
            pair_texts=None if self.pair_texts is None else taken(self.pair_texts, rows),
            labels=labels,
            notes=self.notes if note is None else [*self.notes, note],
            items=items,
            answers=None if self.answers is None else [self.answers[row] for row in rows.tolist()],
        )

    def piece(self, start: int, stop: int) -> Rows:
        """Return the rows from `start` to `stop`, with their texts in memory as lists."""
        items, labels = self.items, self.labels
        bounds = slice(start, stop)
        part = bounds
        if items is not None:
            part = slice(*items.offsets[[start, min(stop, len(self))]].tolist())
            offsets = items.offsets[start : stop + 1] - items.offsets[start]
            items = Items(list(items.texts[part]), offsets, items.labelled)
        return dataclasses.replace(
            self,
            ids=list(self.ids[bounds]),
            texts=list(self.texts[bounds]),
            pair_texts=None if self.pair_texts is None else list(self.pair_texts[bounds]),
            labels=None if labels is None else labels[part if items is not None and items.labelled else bounds],
            items=items,
            answers=None if self.answers is None else self.answers[bounds],
        )


def ranges(starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Return starts[0], ..., stops[0] - 1, starts[1], ..., stops[1] - 1, ..., int64."""
    sizes = stops - starts
    total = int(sizes.sum())
    return np.arange(total) + np.repeat(starts - (np.cumsum(sizes) - sizes), sizes)
