"""Scores of linear models on word counts: a trained encoder must score higher than these models.

The files are those of the demo corpus (tools/make_demo_corpus.py).
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Literal

import numpy as np


def bag_of_words_score(train: Path, dev: Path, kind: Literal["sentiment", "paraphrase", "similarity"]) -> float:
    """Return the dev score of a linear model on word counts.

    train, dev: the files. The score is the accuracy of logistic regression, or for
    kind="similarity" Pearson's r of ridge regression. The features of a pair are the counts of both
    texts, their absolute difference, the share of common words (Jaccard) and the difference of the
    lengths.
    """
    from scipy.sparse import csr_matrix, hstack
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression, Ridge

    texts_train, labels_train = _read(train)
    texts_dev, labels_dev = _read(dev)
    counts = CountVectorizer().fit([text for row in texts_train for text in row])

    def features(rows: list[list[str]]) -> csr_matrix:
        columns = [counts.transform([row[k] for row in rows]) for k in range(len(rows[0]))]
        if len(columns) == 2:
            columns += [abs(columns[0] - columns[1]), csr_matrix(np.array([_overlap(*row) for row in rows]))]
        return hstack(columns).tocsr()

    if kind == "similarity":
        predicted = Ridge().fit(features(texts_train), labels_train).predict(features(texts_dev))
        return float(np.corrcoef(predicted, labels_dev)[0, 1])
    model = LogisticRegression(max_iter=1000).fit(features(texts_train), labels_train)
    return float(model.score(features(texts_dev), labels_dev))


def complaints_score(train: Path, dev: Path) -> float:
    """Return the dev micro F1 of a logistic regression on word counts for each part of a stay."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.preprocessing import MultiLabelBinarizer

    (texts_train, labels_train), (texts_dev, labels_dev) = _read_complaints(train), _read_complaints(dev)
    names, counts = MultiLabelBinarizer().fit(labels_train), CountVectorizer().fit(texts_train)
    model = OneVsRestClassifier(LogisticRegression(max_iter=1000))
    model.fit(counts.transform(texts_train), names.transform(labels_train))
    predicted = model.predict(counts.transform(texts_dev))
    return float(f1_score(names.transform(labels_dev), predicted, average="micro"))


def entities_score(train: Path, dev: Path, neighbours: int) -> float:
    """Return the share of the dev words of entities whose tag a logistic regression finds.

    The features of a word are the word itself and its neighbours, so many on each side.
    """
    from sklearn.feature_extraction import DictVectorizer
    from sklearn.linear_model import LogisticRegression

    (words_train, tags_train), (words_dev, tags_dev) = _read_entities(train), _read_entities(dev)

    def features(sentences: list[list[str]]) -> list[dict[str, str]]:
        around = range(-neighbours, neighbours + 1)
        edge = [""] * neighbours
        padded = [[*edge, *map(str.lower, words), *edge] for words in sentences]
        return [
            {str(place): words[index + place] for place in around}
            for words in padded
            for index in range(neighbours, len(words) - neighbours)
        ]

    columns = DictVectorizer().fit(features(words_train))
    model = LogisticRegression(max_iter=300).fit(columns.transform(features(words_train)), tags_train)
    predicted = model.predict(columns.transform(features(words_dev)))
    return float(np.mean([found == tag for found, tag in zip(predicted, tags_dev, strict=True) if tag != "O"]))


def _read_complaints(path: Path) -> tuple[list[str], list[list[str]]]:
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    return [row["text"] for row in rows], [row["complaints"].split(";") if row["complaints"] else [] for row in rows]


def _read_entities(path: Path) -> tuple[list[list[str]], list[str]]:
    """Return the words of each sentence, and the tags of all words."""
    sentences = [
        [line.split(" ") for line in block.split("\n") if not line.startswith("# ")]
        for block in path.read_text(encoding="utf-8").strip().split("\n\n")
    ]
    return [[word for word, _ in lines] for lines in sentences], [tag for lines in sentences for _, tag in lines]


def _overlap(one: str, two: str) -> list[float]:
    words = [set(text.lower().rstrip(".").split()) for text in (one, two)]
    return [len(words[0] & words[1]) / len(words[0] | words[1]), abs(len(one.split()) - len(two.split()))]


def _read(path: Path) -> tuple[list[list[str]], np.ndarray]:
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.reader(stream, delimiter="\t"))[1:]
    return [row[2:-1] for row in rows], np.array([float(row[-1]) for row in rows])
