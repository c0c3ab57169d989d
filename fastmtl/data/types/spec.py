"""The description of a task type for the reading and tokenisation of its files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fastmtl.config import TaskConfig
from fastmtl.data.places import Place
from fastmtl.data.records import OnBadRow
from fastmtl.data.rows import Rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The arrays of tokenised rows by name; the names are fields of TokenizedDataset and UnitTable.
Arrays = dict[str, np.ndarray]


class ReadRows(Protocol):
    """A function that reads a file, or another place, of one task type.

    It calls `bad` for a bad row, which it then leaves out. require_labels: False leaves the labels
    unread. numbers: yields the number of the next row over all places of a split, from 0; it is the
    id of a row without one. Raises UserError for a file that cannot be read at all.
    """

    def __call__(
        self, place: Place, task: TaskConfig, bad: OnBadRow, *, require_labels: bool, numbers: Iterator[int]
    ) -> Rows: ...


class Encode(Protocol):
    """A function that tokenises rows.

    It returns the arrays of the examples, and how many of them were cut to `max_length` tokens. An
    array whose name ends in `offsets` begins with 0 and counts from the first row.
    """

    def __call__(
        self, rows: Rows, tokenizer: PreTrainedTokenizerBase, task: TaskConfig, max_length: int
    ) -> tuple[Arrays, int]: ...


class Label(Protocol):
    """A function that returns the labels of the examples and the number of loss terms of each.

    The second is int64 [n], or None for 1 each: a task's loss is a mean over its terms. labels:
    None for rows without labels. arrays: the result of `Encode`.
    """

    def __call__(
        self, rows: Rows, arrays: Mapping[str, np.ndarray], task: TaskConfig
    ) -> tuple[np.ndarray | None, np.ndarray | None]: ...


def no_notes(rows: Rows, arrays: Mapping[str, np.ndarray], task: TaskConfig) -> list[str]:
    """Return no line."""
    return []


@dataclass(frozen=True)
class DataType:
    """A task type.

    settings: function that returns the task's settings that `encode` reads. formats: names of the
    formats of its files. notes: function of (rows, result of `encode`, task) that returns lines for
    the user about the tokenised rows. cut: the end of the note "N of M ..." about cut examples.
    """

    read: ReadRows
    encode: Encode
    label: Label
    settings: Callable[[TaskConfig], list[Any]]
    formats: tuple[str, ...] = ("table",)
    notes: Callable[[Rows, Mapping[str, np.ndarray], TaskConfig], list[str]] = no_notes
    cut: str = "texts cut to the encoder's positions"
