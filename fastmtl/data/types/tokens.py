"""Reading and tokenisation of sentences with a tag per word.

The tokenizer gets the words joined by spaces, and a piece belongs to the word that has its last
character. The pieces are therefore those of the sentence in every family; tokenizers of RoBERTa
and ModernBERT would give single words other pieces, without the space before them.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from fastmtl.config import TaskConfig
from fastmtl.config.types.tokens import split_tag
from fastmtl.data.cells import repeated_ids
from fastmtl.data.encode import sequence_arrays, state_kept
from fastmtl.data.places import Place
from fastmtl.data.records import BadRow, OnBadRow
from fastmtl.data.rows import Items, Rows
from fastmtl.data.sentences import Sentence, read_sentences
from fastmtl.data.tags import allowed
from fastmtl.data.text_column import TextBuilder
from fastmtl.data.types.spec import Arrays, DataType
from fastmtl.errors import listed, quoted
from fastmtl.files.label_text import as_label, as_number

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_LABEL = -100  # the label of a word without one


class _BadWord(Exception):
    """Raised for a sentence that cannot be used. row: its message. missing: as in BadRow."""

    def __init__(self, line: int, column: str, reason: str, *, missing: bool = False) -> None:
        super().__init__(reason)
        self.row = BadRow(line, column, reason, missing)


def read(place: Place, task: TaskConfig, bad: OnBadRow, *, require_labels: bool, numbers: Iterator[int]) -> Rows:
    """Return the sentences of one place; see `ReadRows`."""
    ids, texts, words = TextBuilder(), TextBuilder(), TextBuilder()
    lines, labels, counts = array("q"), array("q"), array("q", [0])
    tags = Tags(task)
    sentences = read_sentences(place, task, bad, require_labels=require_labels)
    for sentence, number in zip(sentences, numbers, strict=False):
        if sentence is None:
            continue
        try:
            found = _words(sentence)
            labels.extend(tags.read(sentence))
        except _BadWord as problem:
            bad(problem.row)
            continue
        ids.append(sentence.id or str(number))
        lines.append(sentence.lines[0])
        texts.append(" ".join(found))
        words.extend(found)
        counts.append(len(found))
    known = ids.done()
    return Rows(
        path=place,
        ids=known,
        texts=texts.done(),
        pair_texts=None,
        labels=np.array(labels, dtype=np.int64) if require_labels else None,
        notes=repeated_ids(place, known, lines),
        items=Items(words.done(), np.cumsum(counts), labelled=True),
    )


def _words(sentence: Sentence) -> list[str]:
    words = [" ".join(word.split()) for word in sentence.words]
    for line, word in zip(sentence.lines, words, strict=True):
        if not word:
            raise _BadWord(line, sentence.columns[0], "expected a word, found none")
    return words


class Tags:
    """Conversion of the tags of one file to ids, and the check of their sequence by the scheme.

    A tag is a name, or in JSON lines and Parquet an id from 0. No tag: null, `_` or -100.
    """

    def __init__(self, task: TaskConfig) -> None:
        self._names = task.label_names or []
        self._ids: dict[object, int] = {as_label(name): index for index, name in enumerate(self._names)}
        by_name_only = any(as_number(name) is not None for name in self._names)
        self._numbers = {} if by_name_only else {index: index for index in range(len(self._names))}
        self._none = {"_", "-100"} - self._ids.keys()
        self._scheme, self._allowed = task.tokens.scheme, allowed(task)

    def read(self, sentence: Sentence) -> list[int]:
        """Return the ids of a sentence's tags, -100 for a word without one; [] without labels.

        Raises _BadWord for an unknown tag, for a sequence that the scheme does not allow, and for a
        sentence without any tag.
        """
        if sentence.tags is None:
            return []
        found = []
        for line, word, tag in zip(sentence.lines, sentence.words, sentence.tags, strict=True):
            index = self._id(tag)
            if index is None:
                raise _BadWord(
                    line,
                    sentence.columns[1],
                    f"the word {quoted(word, 40)} has the tag {quoted(tag, 40)}; expected one of "
                    f"{listed(self._names, 12)}",
                )
            found.append(index)
        if all(index == NO_LABEL for index in found):
            raise _BadWord(
                sentence.lines[0],
                sentence.columns[1],
                "expected a tag, but no word of the sentence has one",
                missing=True,
            )
        problem = self._allowed.problem(self._names, found) if self._scheme != "none" else None
        if problem is not None:
            position, reason = problem
            word = quoted(sentence.words[position], 40)
            raise _BadWord(
                sentence.lines[position], sentence.columns[1], f"the word {word}: {reason} (scheme {self._scheme})"
            )
        return found

    def _id(self, tag: object) -> int | None:
        if isinstance(tag, int) and not isinstance(tag, bool) and tag in self._numbers:
            return tag
        if tag is None:
            return NO_LABEL
        label = as_label(tag) if isinstance(tag, str | int) else None
        if label in self._ids:
            return self._ids[label]
        return NO_LABEL if label in self._none else None


def encode(rows: Rows, tokenizer: PreTrainedTokenizerBase, task: TaskConfig, max_length: int) -> tuple[Arrays, int]:
    """Tokenise each sentence as one sequence, with the chosen pieces of its words as units."""
    assert rows.items is not None
    ids, types, places, items, counts = [], [], [], [], [0]
    truncated = 0
    with state_kept(tokenizer):
        for start in range(0, len(rows), 1000):  # the offsets of all rows would take much memory
            texts = rows.texts[start : start + 1000]
            wanted = {"return_token_type_ids": True, "return_offsets_mapping": True, "return_special_tokens_mask": True}
            encoded = tokenizer(texts, verbose=False, truncation=False, **wanted)
            for index, text in enumerate(texts):
                found = {name: encoded[name][index] for name in encoded}
                if len(found["input_ids"]) > max_length:
                    cut = tokenizer([text], truncation="longest_first", max_length=max_length, **wanted)
                    found = {name: cut[name][0] for name in cut}
                    truncated += 1
                ids.append(found["input_ids"])
                types.append(found["token_type_ids"])
                chosen, words = _units(
                    rows.items.of(start + index), found["offset_mapping"], found["special_tokens_mask"], task
                )
                places.append(chosen)
                items.append(words)
                counts.append(len(chosen))
    arrays = sequence_arrays(ids, types, rows.path)
    arrays["unit_offsets"] = np.cumsum(counts)
    arrays["unit_places"] = np.concatenate([np.zeros(0, np.int32), *places]).astype(np.int32)
    arrays["unit_items"] = np.concatenate([np.zeros(0, np.int32), *items]).astype(np.int32)
    return arrays, truncated


def _units(
    words: list[str], spans: list[tuple[int, int]], special: list[int], task: TaskConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of the pieces that stand for words, and the numbers of their words.

    words: those of a sentence. spans: first character and end of each token in the sentence.
    special: 1 for tokens that are no part of it.
    """
    ends = np.cumsum([len(word) + 1 for word in words]) - 1
    places = np.flatnonzero(np.asarray(special) == 0)
    if not len(places):
        return places, places
    starts, stops = np.asarray(spans, dtype=np.int64)[places].T
    # A piece of the space before a word only, as SentencePiece has them, belongs to the word.
    items = np.searchsorted(ends, np.maximum(starts, stops - 1), side="right")
    changes = items[1:] != items[:-1]
    match task.tokens.subwords:
        case "first":
            chosen = np.concatenate([[True], changes])
        case "last":
            chosen = np.concatenate([changes, [True]])
        case "all":
            chosen = np.ones(len(items), dtype=bool)
    return places[chosen], items[chosen]


def label(
    rows: Rows, arrays: Mapping[str, np.ndarray], task: TaskConfig
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return the tag of each unit, and the number of units with one of each sentence.

    With `subwords: all` the pieces of a word get the tags of an entity of as many words: those of
    B-X are B-X, I-X, ...; in IOBES those of S-X are B-X, I-X, ..., E-X.
    """
    if rows.labels is None:
        return None, None
    assert rows.items is not None
    offsets, items = arrays["unit_offsets"], arrays["unit_items"]
    words = items + np.repeat(rows.items.offsets[:-1], np.diff(offsets))
    labels = rows.labels[words]
    if task.tokens.subwords == "all" and task.tokens.scheme != "none":
        begins = np.concatenate([[True], words[1:] != words[:-1]])[: len(words)]
        ends = np.concatenate([words[1:] != words[:-1], [True]])[: len(words)]
        known = labels >= 0
        of_pieces = piece_tags(task)
        labels[known] = of_pieces[begins[known].astype(int), ends[known].astype(int), labels[known]]
    totals = np.concatenate([[0], np.cumsum(labels >= 0)])
    return labels, totals[offsets[1:]] - totals[offsets[:-1]]


def piece_tags(task: TaskConfig) -> np.ndarray:
    """Return the tags of a word's pieces, int64 [2, 2, C].

    The indices: whether the piece is the word's first, whether it is the last, the word's tag.
    """
    names = task.label_names or []
    result = np.tile(np.arange(len(names)), (2, 2, 1))
    for tag, (prefix, kind) in enumerate(map(split_tag, names)):
        begins, ends = prefix in "BS", prefix in "ES"
        for first in (0, 1):
            for last in (0, 1):
                if kind and task.tokens.scheme == "iobes":
                    new = {(1, 0): "B", (0, 0): "I", (0, 1): "E", (1, 1): "S"}[(first & begins, last & ends)]
                    result[first, last, tag] = names.index(f"{new}-{kind}")
                elif prefix == "B" and not first:
                    result[first, last, tag] = names.index(f"I-{kind}")
    return result


def notes(rows: Rows, arrays: Mapping[str, np.ndarray], task: TaskConfig) -> list[str]:
    """Return a line about the words that have no piece, or none."""
    assert rows.items is not None
    items, offsets = arrays["unit_items"], arrays["unit_offsets"]
    words = items + np.repeat(rows.items.offsets[:-1], np.diff(offsets))
    missing = len(rows.items.texts) - len(np.unique(words))
    if not missing:
        return []
    names = task.label_names or []
    return [
        f"{missing} of {len(rows.items.texts)} words have no token, since their sentence is longer than the encoder's "
        f"positions or the tokenizer drops their characters; they are predicted as {names[tag_without_token(task)]}"
    ]


def tag_without_token(task: TaskConfig) -> int:
    """Return the tag that a word without a token is predicted to have: O, or else the first."""
    names = task.label_names or []
    return names.index("O") if "O" in names else 0


TOKENS = DataType(
    read,
    encode,
    label,
    lambda task: [task.tokens.subwords],
    formats=("table", "conll", "conllu"),
    notes=notes,
)
