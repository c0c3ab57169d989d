"""Scores of linear models on word counts: a trained encoder must score higher than these models."""

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


def _overlap(one: str, two: str) -> list[float]:
    words = [set(text.lower().rstrip(".").split()) for text in (one, two)]
    return [len(words[0] & words[1]) / len(words[0] | words[1]), abs(len(one.split()) - len(two.split()))]


def _read(path: Path) -> tuple[list[list[str]], np.ndarray]:
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.reader(stream, delimiter="\t"))[1:]
    return [row[2:-1] for row in rows], np.array([float(row[-1]) for row in rows])
