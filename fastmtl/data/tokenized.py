"""Tokenisation of a task's rows, with a cache on disk."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastmtl.config import TaskConfig
from fastmtl.data.display import tokenization_progress
from fastmtl.data.places import Place
from fastmtl.data.records import BadRow
from fastmtl.data.rows import Rows, ranges
from fastmtl.data.text_column import taken
from fastmtl.data.token_cache import EntryWriter, NotWritable, array_pieces, entry_key, json_pieces, load_entry
from fastmtl.data.types import DATA_TYPES
from fastmtl.errors import UserError
from fastmtl.files.user_path import cache_instead, cache_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A tokenizer needs several hundred bytes of memory per token.
PIECE_ROWS, PIECE_CHARACTERS = 16_384, 1 << 21


@dataclass(frozen=True)
class UnitTable:
    """The units of n examples: what the head scores one by one, of tokens or of sequences.

    They are words of type tokens, places of an answer's ends of type span, or texts of types choice
    and ranking.

    offsets: int64 [n + 1]; example i has the units offsets[i] to offsets[i + 1] - 1.
    places: int32 [U], the position of each unit's token in its example, which has one sequence;
    None if the units are sequences.
    items: int32 [U], the number of each unit's item in its row (`Rows.items`), or None.
    spans: int32 [U, 2], first character and end of each unit in its row's text, or None.
    labelled: True if the labels have one value per unit, not one per example.
    query_first: True if the first sequence of an example is a query that is no unit.
    """

    offsets: np.ndarray
    places: np.ndarray | None
    items: np.ndarray | None = None
    spans: np.ndarray | None = None
    labelled: bool = False
    query_first: bool = False

    def take(self, rows: np.ndarray) -> UnitTable:
        """Return the units of the examples `rows`, int64 [k]."""
        units = self.positions(rows)
        return dataclasses.replace(
            self,
            offsets=np.concatenate([[0], np.cumsum(np.diff(self.offsets)[rows])]),
            places=_chosen(self.places, units),
            items=_chosen(self.items, units),
            spans=_chosen(self.spans, units),
        )

    def positions(self, rows: np.ndarray) -> np.ndarray:
        """Return the positions of the units of the examples `rows`, int64."""
        return ranges(self.offsets[rows], self.offsets[rows + 1])


@dataclass(frozen=True)
class TokenizedDataset:
    """The token ids of n examples of one file.

    Example i has sequences_per_example sequences one after the other, 2 for a pair whose texts are
    encoded apart (`pairs: bi`), else 1; or as many as example_offsets say.

    tokens: int32 [all tokens], memory-mapped.
    offsets: int64 [S + 1]; sequence s is tokens[offsets[s]:offsets[s + 1]].
    second_text: int32 [S], the position in the sequence at which the second text (token type 1)
    begins; the length of the sequence if it has one text.
    labels: one per example or per unit, with the dtypes of `Rows`; or None.
    ids: the id of each example's row in the file.
    truncated: number of examples that were cut to max_length. skipped, notes: as in `Rows`.
    example_offsets: int64 [n + 1]; example i has the sequences example_offsets[i] to
    example_offsets[i + 1] - 1. None: sequences_per_example each.
    units: see UnitTable; None if the head gives one output per example.
    loss_terms: int64 [n], the number of loss terms of each example; None for 1 each.
    rows: the rows that the examples are made of; None for training rows.
    row_of: int64 [n], the position in `rows` of each example's row; None if they are the same.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    second_text: np.ndarray
    sequences_per_example: int
    labels: np.ndarray | None
    ids: Sequence[str]
    truncated: int
    skipped: list[BadRow]
    path: Place | str
    notes: list[str] = field(default_factory=list)
    example_offsets: np.ndarray | None = None
    units: UnitTable | None = None
    loss_terms: np.ndarray | None = None
    rows: Rows | None = None
    row_of: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_rows(self) -> int:
        """The number of rows that the examples are made of."""
        return len(self) if self.row_of is None else len(np.unique(self.row_of))

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each example, in all its sequences, int64 [n]."""
        if self.example_offsets is not None:
            return np.diff(self.offsets[self.example_offsets])
        return np.diff(self.offsets[:: self.sequences_per_example])

    def sequences(self, rows: np.ndarray) -> np.ndarray:
        """Return the numbers of the sequences of the examples `rows`, one example after the other.

        rows: int64 [k].
        """
        if self.example_offsets is not None:
            return ranges(self.example_offsets[rows], self.example_offsets[rows + 1])
        per_example = self.sequences_per_example
        return (rows[:, None] * per_example + np.arange(per_example)).reshape(-1)

    def labels_of(self, rows: np.ndarray) -> np.ndarray | None:
        """Return the labels of the examples `rows`, int64 [k], or those of their units."""
        if self.labels is None:
            return None
        return self.labels[self.units.positions(rows) if self.units is not None and self.units.labelled else rows]

    def digest(self) -> str:
        """Return the SHA-256 of the rows' tokens, offsets, units, labels and ids."""
        digest = hashlib.sha256(f"[{self.sequences_per_example}, [".encode())
        for piece in json_pieces(self.ids):
            digest.update(piece)
        digest.update(b"]]")
        labels = np.zeros(0) if self.labels is None else self.labels
        arrays = [self.tokens, self.offsets, self.second_text, labels]
        if self.example_offsets is not None:
            arrays.append(self.example_offsets)
        if self.units is not None:
            given = (self.units.offsets, self.units.places, self.units.items, self.units.spans)
            arrays.extend(array for array in given if array is not None)
        for array in arrays:
            digest.update(f"{array.dtype} {array.shape} ".encode())
            for part in array_pieces(array):
                digest.update(part)
        return digest.hexdigest()

    def examples_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the positions of all examples of some rows, int64, ascending.

        rows: int [k], ascending, from 0 to num_rows - 1.
        """
        if self.row_of is None:
            return rows
        return np.flatnonzero(np.isin(self.row_of, np.unique(self.row_of)[rows]))

    def take(self, rows: np.ndarray) -> TokenizedDataset:
        """Return a data set of the examples at the positions `rows`, int [k].

        The result is in memory, not memory-mapped.
        """
        rows = np.asarray(rows, dtype=np.int64)
        sequences = self.sequences(rows)
        starts, stops = self.offsets[sequences], self.offsets[sequences + 1]
        per_example = self.example_offsets
        return dataclasses.replace(
            self,
            tokens=np.asarray(self.tokens[ranges(starts, stops)]),
            offsets=np.concatenate([[0], np.cumsum(stops - starts)]),
            second_text=self.second_text[sequences],
            labels=self.labels_of(rows),
            ids=taken(self.ids, rows),
            example_offsets=None
            if per_example is None
            else np.concatenate([[0], np.cumsum(np.diff(per_example)[rows])]),
            units=None if self.units is None else self.units.take(rows),
            loss_terms=None if self.loss_terms is None else self.loss_terms[rows],
            row_of=rows if self.row_of is None and self.rows is not None else _chosen(self.row_of, rows),
        )


def _chosen(array: np.ndarray | None, rows: np.ndarray) -> np.ndarray | None:
    return None if array is None else array[rows]


def tokenize(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    task: TaskConfig,
    max_length: int,
    cache_dir: str | Path,
    *,
    keep_rows: bool = False,
) -> TokenizedDataset:
    """Return the token ids of `rows`, from the cache in `cache_dir` if they are there.

    The key of a cache entry is a digest of texts, tokenizer and settings. max_length: the most
    tokens of a sequence, [CLS] and [SEP] included; in a pair the longer text is cut first. A
    damaged cache entry is rebuilt. If the cache is not writable, a temporary folder is used and a
    line on standard error says so. keep_rows: whether the result has the rows, which an evaluation
    needs. Raises UserError where `check_pairs` raises it, and for token types other than 0 and 1.
    """
    kind = DATA_TYPES[task.type]
    # The module of `encode`, since types that tokenise by the same function share their entries.
    key = entry_key(rows, tokenizer, [kind.encode.__module__, *kind.settings(task)], max_length)
    entry = cache_path(cache_dir) / f"tokens-{key}"
    found = load_entry(entry)
    if found is None:
        try:
            _make(entry, rows, tokenizer, task, max_length)
        except NotWritable as error:
            entry = cache_instead(cache_dir, str(error)) / entry.name
            _make(entry, rows, tokenizer, task, max_length)
        found = load_entry(entry)
        assert found is not None
    return _dataset(rows, *found, task, keep_rows=keep_rows)


def tokenize_in_memory(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, task: TaskConfig, max_length: int
) -> TokenizedDataset:
    """Return the token ids of a few rows, without a cache; the result has the rows.

    Raises UserError where `tokenize` raises it.
    """
    found = DATA_TYPES[task.type].encode(rows, tokenizer, task, max_length)
    return _dataset(rows, *found, task, keep_rows=True)


def _dataset(
    rows: Rows, arrays: Mapping[str, np.ndarray], truncated: int, task: TaskConfig, *, keep_rows: bool
) -> TokenizedDataset:
    """Return the data set of encoded rows. arrays, truncated: the result of `Encode`."""
    kind = DATA_TYPES[task.type]
    labels, loss_terms = kind.label(rows, arrays, task)
    row_of = arrays.get("row_of")
    return TokenizedDataset(
        tokens=arrays["tokens"],
        offsets=arrays["offsets"],
        second_text=arrays["second_text"],
        sequences_per_example=2 if task.pairs == "bi" else 1,
        labels=labels,
        ids=rows.ids if row_of is None else taken(rows.ids, row_of),
        truncated=truncated,
        skipped=rows.skipped,
        path=rows.path,
        notes=[*rows.notes, *kind.notes(rows, arrays, task)],
        example_offsets=arrays.get("example_offsets"),
        units=_units(arrays, labelled=rows.items is not None and rows.items.labelled, query_first=task.pairs == "bi"),
        loss_terms=loss_terms,
        rows=rows if keep_rows else None,
        row_of=row_of,
    )


def _make(entry: Path, rows: Rows, tokenizer: PreTrainedTokenizerBase, task: TaskConfig, max_length: int) -> None:
    """Tokenise the rows in pieces and write the cache entry. Raises NotWritable."""
    encode = DATA_TYPES[task.type].encode
    writer = EntryWriter(entry)
    try:
        shown = tokenization_progress(getattr(rows.path, "name", str(rows.path)), len(rows))
        with shown if len(rows) > PIECE_ROWS else nullcontext() as show:
            done = 0
            for piece in _pieces(rows):
                arrays, truncated = encode(piece, tokenizer, task, max_length)
                writer.append(arrays, truncated, len(piece))
                done += len(piece)
                if show is not None:
                    show(done)
        writer.finish()
    finally:
        writer.close()


def _pieces(rows: Rows) -> Iterator[Rows]:
    """Yield the rows in pieces of at most PIECE_ROWS rows and PIECE_CHARACTERS characters.

    A row that is longer is a piece of its own.
    """
    for start in range(0, max(1, len(rows)), PIECE_ROWS):
        pieces = [rows.piece(start, start + PIECE_ROWS)]
        while pieces:
            piece = pieces.pop()
            texts = (piece.texts, piece.pair_texts or (), () if piece.items is None else piece.items.texts)
            if len(piece) > 1 and sum(map(len, chain(*texts))) > PIECE_CHARACTERS:
                half = len(piece) // 2
                pieces += [piece.piece(half, len(piece)), piece.piece(0, half)]
            else:
                yield piece


def _units(arrays: Mapping[str, np.ndarray], *, labelled: bool, query_first: bool) -> UnitTable | None:
    if "unit_offsets" not in arrays:
        return None
    found = {name: arrays.get(f"unit_{name}") for name in ("places", "items", "spans")}
    return UnitTable(arrays["unit_offsets"], **found, labelled=labelled, query_first=query_first)


def check_token_types(datasets: Iterable[TokenizedDataset | None], token_types: int) -> None:
    """Raise UserError for data with second texts if the encoder has only one token type.

    token_types: rows of the encoder's table of token types; 0 for an encoder without a table, to
    which token types make no difference.
    """
    for dataset in datasets:
        if dataset is not None and token_types == 1 and (dataset.second_text < np.diff(dataset.offsets)).any():
            raise UserError(
                f"{dataset.path}: its pairs need two token types, and the encoder has {token_types} (type_vocab_size "
                "in its config.json): set pairs: bi for this task, or take another encoder"
            )


def check_pairs(rows: Rows, task: TaskConfig) -> None:
    """Raise UserError if the task has `pairs: bi` and its rows have one text each."""
    if task.pairs == "bi" and rows.pair_texts is None and rows.items is None:
        raise UserError(f"{rows.path}: pairs: bi needs two texts per row, the file has one; leave `pairs` out")
