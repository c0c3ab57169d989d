"""Columns of texts: lists, or files for columns that are too large for memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np

from fastmtl.data import spill
from fastmtl.data.spill import Spill

_OBJECT = 57  # bytes of an empty string and of its place in a list
_FLUSHED = 16  # a column in a file keeps a sixteenth of spill.IN_MEMORY until it is written
_READ = 8192  # texts that an iteration reads at once


class TextBuilder:
    """A column of texts that grows. It moves to a temporary file if it is too large for memory."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._size, self._limit = 0, spill.IN_MEMORY
        self._bytes: Spill | None = None
        self._offsets: Spill | None = None

    def append(self, text: str) -> None:
        self._texts.append(text)
        self._size += len(text) + _OBJECT
        if self._size > self._limit:
            self._flush()

    def extend(self, texts: Iterable[str]) -> None:
        for text in texts:
            self.append(text)

    def done(self) -> Sequence[str]:
        """Return a list, or a TextColumn if the texts are in a file."""
        if self._bytes is None:
            return self._texts
        self._flush()
        assert self._offsets is not None
        return TextColumn(self._bytes, self._offsets)

    def _flush(self) -> None:
        if self._bytes is None or self._offsets is None:
            self._bytes, self._offsets = Spill(), Spill()
            self._offsets.append(bytes(8))
            self._limit = spill.IN_MEMORY // _FLUSHED
        encoded = [text.encode("utf-8", "surrogatepass") for text in self._texts]
        ends = self._bytes.size + np.cumsum(np.fromiter(map(len, encoded), np.int64, len(encoded)))
        self._bytes.append(b"".join(encoded))
        self._offsets.append(ends.astype("<i8").tobytes())
        self._texts.clear()
        self._size = 0


class TextColumn(Sequence[str]):
    """n texts in a temporary file, or some of them.

    content: the texts in UTF-8. offsets: a file of int64 [all texts + 1]; text i has the bytes
    offsets[i] to offsets[i + 1] - 1. chosen: int64 [n], the texts of this column; None for all.
    """

    def __init__(self, content: Spill, offsets: Spill, chosen: np.ndarray | None = None) -> None:
        self._content, self._offsets, self._chosen = content, offsets, chosen

    def __len__(self) -> int:
        return self._offsets.size // 8 - 1 if self._chosen is None else len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            numbers = range(*index.indices(len(self)))
            return self._at(np.arange(numbers.start, numbers.stop, numbers.step))
        size = len(self)
        if not -size <= index < size:
            raise IndexError(f"text {index} of {size}")
        return self._at(np.array([index % size]))[0]

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _READ):
            yield from self[start : start + _READ]

    def take(self, positions: np.ndarray) -> TextColumn:
        """Return the texts at the positions, int64 [k]. The texts are not read."""
        chosen = positions if self._chosen is None else self._chosen[positions]
        return TextColumn(self._content, self._offsets, chosen)

    def _at(self, positions: np.ndarray) -> list[str]:
        if not len(positions):
            return []
        rows = positions if self._chosen is None else self._chosen[positions]
        low, high = int(rows.min()), int(rows.max()) + 1
        if high - low > max(4 * len(rows), 64):  # far apart
            return [self._range(row, row + 1)[0] for row in rows.tolist()]
        texts = self._range(low, high)
        return texts if np.array_equal(rows, np.arange(low, high)) else [texts[row - low] for row in rows.tolist()]

    def _range(self, low: int, high: int) -> list[str]:
        offsets = np.frombuffer(self._offsets.read(8 * low, 8 * (high + 1)), "<i8").tolist()
        start = offsets[0]
        content = self._content.read(start, offsets[-1])
        bounds = zip(offsets, offsets[1:], strict=False)
        return [content[begin - start : end - start].decode("utf-8", "surrogatepass") for begin, end in bounds]


class NumberColumn(Sequence[str]):
    """n whole numbers as texts, the ids of rows in files without an id column.

    numbers: int64 [n].
    """

    def __init__(self, numbers: np.ndarray | range) -> None:
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [str(number) for number in self._numbers[index]]
        return str(self._numbers[index])

    @property
    def numbers(self) -> np.ndarray:
        return np.asarray(self._numbers)

    def take(self, positions: np.ndarray) -> NumberColumn:
        """Return the numbers at the positions, int64 [k]."""
        return NumberColumn(self.numbers[positions])


def row_numbers(numbers: array[int]) -> Sequence[str]:
    """Return ascending numbers as texts: a list, or a NumberColumn if they need much memory."""
    if len(numbers) * _OBJECT <= spill.IN_MEMORY:
        return list(map(str, numbers))
    whole = range(numbers[0], numbers[-1] + 1)
    return NumberColumn(whole if len(whole) == len(numbers) else np.array(numbers, dtype=np.int64))


def taken(column: Sequence[str], positions: np.ndarray) -> Sequence[str]:
    """Return the texts of a column at the positions, int64 [k]."""
    if isinstance(column, (TextColumn, NumberColumn)):
        return column.take(positions)
    return [column[position] for position in positions.tolist()]


def joined(columns: Sequence[Sequence[str]]) -> Sequence[str]:
    """Return the texts of several columns, one column after the other."""
    numbers = [column.numbers for column in columns if isinstance(column, NumberColumn)]
    if len(numbers) == len(columns):
        return NumberColumn(np.concatenate(numbers))
    builder = TextBuilder()
    for column in columns:
        builder.extend(column)
    return builder.done()
