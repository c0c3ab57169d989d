"""Evaluation and predictions of type tokens: a tag per word, and entities for tags of a scheme.

`f1` is seqeval's default: micro-averaged over entities, which any sequence of tags may form;
`strict_f1` is that of its mode `strict`. Words without a label do not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fastmtl.config import TaskConfig
from fastmtl.config.types.tokens import split_tag
from fastmtl.data.rows import Items, Rows, ranges
from fastmtl.data.tokenized import TokenizedDataset
from fastmtl.data.types.tokens import tag_without_token
from fastmtl.errors import UserError, quoted
from fastmtl.inference.entities import Entities, entity_counts, entity_types, precision_recall_f1
from fastmtl.inference.metrics import check_finite
from fastmtl.inference.pieces import word_scores
from fastmtl.inference.scores import Scores
from fastmtl.inference.types.single import check_unicode
from fastmtl.inference.types.spec import InferenceType, Summary, Table

WORST = 20  # sentences in the table of errors


@dataclass(frozen=True)
class Entity:
    """An entity in a sentence. start, end: numbers of its first word and of the word after it."""

    type: str
    start: int
    end: int
    text: str


@dataclass(frozen=True)
class TokenPrediction:
    """The prediction for one sentence.

    tags: one per word. probabilities: those of all tags for each word, in the order of the
    recipe's label_names; None for a word without a token, such as one beyond the encoder's
    positions. entities: those of the tags; [] for a task without tokens.scheme.
    """

    words: list[str]
    tags: list[str]
    probabilities: list[tuple[float, ...] | None]
    entities: list[Entity]


class Words:
    """The words of a data set's sentences with their predictions, W in all.

    offsets: int64 [n + 1]; sentence i has the words offsets[i] to offsets[i + 1] - 1.
    tags: int64 [W], predicted. probabilities: float32 [W, C]; NaN for a word without a token.
    """

    def __init__(self, task: TaskConfig, scores: Scores) -> None:
        dataset, rows = scores.dataset, scores.rows
        assert rows.items is not None and dataset.units is not None and dataset.units.items is not None
        self._task, self._rows = task, rows
        self.row_of = np.arange(len(dataset)) if dataset.row_of is None else np.asarray(dataset.row_of)
        starts, stops = rows.items.offsets[self.row_of], rows.items.offsets[self.row_of + 1]
        self._positions = ranges(starts, stops)
        self.offsets = np.concatenate([[0], np.cumsum(stops - starts)])
        word = dataset.units.items + np.repeat(self.offsets[:-1], np.diff(dataset.units.offsets))
        changes = word[1:] != word[:-1]
        first, last = (np.concatenate(parts)[: len(word)] for parts in (([True], changes), (changes, [True])))
        of_words = word_scores(task, scores.scores[first], scores.scores[last])
        self.tags = np.full(self.offsets[-1], tag_without_token(task))
        self.probabilities = np.full((len(self.tags), task.num_labels or 0), np.nan, dtype=np.float32)
        self.tags[word[first]] = of_words[:, 0].astype(np.int64)
        self.probabilities[word[first]] = of_words[:, 1:]

    def texts(self, sentence: int) -> list[str]:
        assert self._rows.items is not None
        return self._rows.items.of(int(self.row_of[sentence]))

    def of(self, sentence: int) -> slice:
        return slice(*self.offsets[sentence : sentence + 2])

    @cached_property
    def labels(self) -> np.ndarray:
        """int64 [W], -100 for a word without a label. Raises UserError without labels."""
        if self._rows.labels is None:
            raise UserError(f"{self._rows.path}: there are no labels to evaluate against")
        return self._rows.labels[self._positions]

    @cached_property
    def labelled(self) -> Labelled:
        """The words that have a label."""
        known = self.labels >= 0
        if not known.any():
            raise UserError(f"{self._rows.path}: no word has a label to evaluate against")
        offsets = np.concatenate([[0], np.cumsum(known)])[self.offsets]
        return Labelled(self.labels[known], self.tags[known], offsets)


@dataclass(frozen=True)
class Labelled:
    """Words with a label. gold, predicted: int64 [W], their tags. offsets: as in Words."""

    gold: np.ndarray
    predicted: np.ndarray
    offsets: np.ndarray

    def entities(self, task: TaskConfig, mode: Any = "default") -> tuple[Entities, Entities]:
        """Return those of the labels and of the predictions."""
        return Entities(task, self.gold, self.offsets, mode), Entities(task, self.predicted, self.offsets, mode)


def metrics(task: TaskConfig) -> tuple[str, ...]:
    return ("accuracy",) if task.tokens.scheme == "none" else ("f1", "precision", "recall", "strict_f1", "accuracy")


def evaluate(task: TaskConfig, scores: Scores) -> dict[str, float]:
    check_finite(scores.scores)
    words = Words(task, scores).labelled
    found = {"accuracy": float((words.gold == words.predicted).mean())}
    if task.tokens.scheme != "none":
        for mode, prefix in (("default", ""), ("strict", "strict_")):
            counts = entity_counts(*words.entities(task, mode)).sum(axis=0)
            names = [f"{prefix}{name}" for name in ("precision", "recall", "f1")]
            found |= dict(zip(names, precision_recall_f1(*counts.tolist()), strict=True))
    return {name: found[name] for name in metrics(task)}


def predictions(task: TaskConfig, scores: Scores) -> list[TokenPrediction]:
    words, names = Words(task, scores), task.label_names or []
    found: list[list[Entity]] = [[] for _ in range(len(words.row_of))]
    if task.tokens.scheme != "none":
        entities = Entities(task, words.tags, words.offsets)
        sentences = np.searchsorted(words.offsets, entities.starts, side="right") - 1
        for sentence, (kind, start, end) in zip(sentences.tolist(), entities.keys().tolist(), strict=True):
            first = int(words.offsets[sentence])
            text = " ".join(words.texts(sentence)[start - first : end + 1 - first])
            found[sentence].append(Entity(entities.types[kind], start - first, end + 1 - first, text))
    return [
        TokenPrediction(
            words.texts(sentence),
            [names[tag] for tag in words.tags[words.of(sentence)]],
            [None if np.isnan(p[0]) else tuple(map(float, p)) for p in words.probabilities[words.of(sentence)]],
            found[sentence],
        )
        for sentence in range(len(words.row_of))
    ]


def rows_of(task: TaskConfig, texts: Sequence[Any]) -> Rows:
    """Return the sentences of `predict`: lists of words, or texts with spaces between words."""
    if isinstance(texts, str):
        raise UserError("predict takes a list of sentences, not one string: write [text]")
    sentences: list[list[str]] = []
    for position, text in enumerate(texts):
        given = text.split() if isinstance(text, str) else text
        if not isinstance(given, list | tuple) or not all(isinstance(word, str) for word in given):
            raise UserError(f"texts[{position}] is neither a list of words nor a string: {quoted(text)}")
        for word in given:
            check_unicode(position, word)
        words = [" ".join(word.split()) for word in given]
        if not words or not all(words):
            raise UserError(f"texts[{position}] has {'an empty word' if words else 'no word'}: {quoted(text)}")
        sentences.append(words)
    return Rows(
        path=Path("texts"),
        ids=[str(position) for position in range(len(sentences))],
        texts=[" ".join(words) for words in sentences],
        pair_texts=None,
        labels=None,
        items=Items(
            [word for words in sentences for word in words],
            np.concatenate([[0], np.cumsum([len(words) for words in sentences])]),
            labelled=True,
        ),
    )


def table(task: TaskConfig, scores: Scores) -> tuple[list[str], Iterable[list[str]]]:
    """Return the columns id, word_number (from 1), word, predicted and p_<tag>: a line per word.

    The probabilities of a word without a token are empty.
    """
    words, names = Words(task, scores), task.label_names or []
    lines = (
        [
            scores.dataset.ids[sentence],
            str(number + 1),
            word,
            names[words.tags[words.offsets[sentence] + number]],
            *("" if np.isnan(p) else f"{p:.6f}" for p in words.probabilities[words.offsets[sentence] + number]),
        ]
        for sentence in range(len(words.row_of))
        for number, word in enumerate(words.texts(sentence))
    )
    return ["id", "word_number", "word", "predicted", *(f"p_{name}" for name in names)], lines


def summary(task: TaskConfig, scores: Scores) -> Summary:
    words = Words(task, scores)
    with_entities = task.tokens.scheme != "none"
    names = ["O", *entity_types(task)] if with_entities else list(task.label_names or ())
    of_tag = np.arange(task.num_labels or 0)
    if with_entities:
        of_tag = np.array([names.index(split_tag(name)[1] or "O") for name in task.label_names or ()])
    gold, predicted = of_tag[words.labelled.gold], of_tag[words.labelled.predicted]
    counts = np.zeros((len(names), len(names)), dtype=np.int64)
    np.add.at(counts, (gold, predicted), 1)
    if with_entities:
        of_label = entity_counts(*words.labelled.entities(task))
    else:
        of_label = np.stack([counts.diagonal(), counts.sum(axis=0), counts.sum(axis=1)], axis=1)
    rows = [
        [name, *(f"{value:.3f}" for value in precision_recall_f1(*row)), f"{row[2]:,}"]
        for name, row in zip(names[1:] if with_entities else names, of_label.tolist(), strict=True)
    ]
    head = ["entity type" if with_entities else "tag", "precision", "recall", "f1", "in the labels"]
    return Summary(names, counts.tolist(), per_label=Table(head, rows), errors=_errors(task, scores, words))


def _errors(task: TaskConfig, scores: Scores, words: Words) -> Table | None:
    """Return the sentences with the most words of a wrong tag, at most WORST."""
    names = task.label_names or []
    wrong = (words.labels >= 0) & (words.labels != words.tags)
    totals = np.concatenate([[0], np.cumsum(wrong)])
    counts = totals[words.offsets[1:]] - totals[words.offsets[:-1]]
    worst = [sentence for sentence in np.argsort(-counts, kind="stable")[:WORST] if counts[sentence]]

    def tagged(sentence: int, tags: np.ndarray) -> str:
        """Return the words with a wrong tag, each with its tag of `tags`."""
        part = words.of(sentence)
        triples = zip(words.texts(sentence), tags[part].tolist(), wrong[part].tolist(), strict=True)
        return " ".join(f"{word}/{names[tag]}" for word, tag, bad in triples if bad)

    rows = [
        [
            scores.dataset.ids[sentence],
            " ".join(words.texts(sentence)),
            tagged(sentence, words.labels),
            tagged(sentence, words.tags),
        ]
        for sentence in worst
    ]
    return Table(["id", "words", "label", "predicted"], rows) if rows else None


def statistics(task: TaskConfig, dataset: TokenizedDataset) -> dict[str, float]:
    """Return the number of units with each tag, {tag id: number}; {} if no unit has a label."""
    labels = np.asarray(dataset.labels)
    counts = np.bincount(labels[labels >= 0], minlength=task.num_labels or 0)
    return {str(tag): int(count) for tag, count in enumerate(counts)} if counts.any() else {}


TOKENS = InferenceType(metrics, evaluate, predictions, rows_of, table, summary, statistics)
