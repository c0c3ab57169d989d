"""Evaluation and predictions of classification, binary and regression: one label per row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastmtl.config import TaskConfig
from fastmtl.data.rows import Rows
from fastmtl.data.tokenized import TokenizedDataset
from fastmtl.errors import UserError, quoted
from fastmtl.inference.metrics import (
    CLASS_METRICS,
    REGRESSION_METRICS,
    confusion,
    evaluate_predictions,
    label_statistics,
    predicted_labels,
)
from fastmtl.inference.scores import Scores
from fastmtl.inference.types.spec import InferenceType, Summary, Table
from fastmtl.inference.types.texts import shown, text_cells, text_columns, worst

Text = str | tuple[str, str]
SCATTER_POINTS = 800  # more would overlap and only make the file larger


@dataclass(frozen=True)
class Prediction:
    """The prediction for one row.

    label: the class id, the class name if the recipe has label_names, or the value of a regression
    task.
    probabilities: those of all classes in the order of their ids (binary: 0 and 1); None for
    regression.
    """

    label: int | str | float
    probabilities: tuple[float, ...] | None = None


def metrics(task: TaskConfig) -> tuple[str, ...]:
    return REGRESSION_METRICS if task.type == "regression" else CLASS_METRICS


def evaluate(task: TaskConfig, scores: Scores) -> dict[str, float]:
    if scores.labels is None:
        raise UserError(f"{scores.dataset.path}: there are no labels to evaluate against")
    return evaluate_predictions(task, scores.scores, scores.labels)


def predictions(task: TaskConfig, scores: Scores) -> list[Prediction]:
    return [_prediction(task, row) for row in scores.scores]


def _prediction(task: TaskConfig, scores: np.ndarray) -> Prediction:
    if task.type == "regression":
        return Prediction(float(scores))
    probabilities = (1 - float(scores), float(scores)) if task.type == "binary" else tuple(map(float, scores))
    label = int(predicted_labels(task, np.asarray([scores]))[0])
    return Prediction(task.label_names[label] if task.label_names else label, probabilities)


def rows_of(task: TaskConfig, texts: Sequence[Text]) -> Rows:
    if isinstance(texts, str):
        raise UserError("predict takes a list of texts or pairs, not one string: write [text]")
    pairs = not isinstance(texts[0], str)
    if task.pairs == "bi" and not pairs:
        raise UserError(f"texts[0] is one text, but the task takes pairs [text, other text]: {quoted(texts[0])}")
    for position, text in enumerate(texts):
        good = (
            isinstance(text, (tuple, list)) and len(text) == 2 and all(isinstance(part, str) for part in text)
            if pairs
            else isinstance(text, str)
        )
        if not good:
            wanted = "a pair of strings (text, other text)" if pairs else "a string"
            raise UserError(f"texts[{position}] is not {wanted} like the first one: {quoted(text)}")
        for part in text if pairs else (text,):
            check_unicode(position, str(part))
    return Rows(
        ids=[str(position) for position in range(len(texts))],
        texts=[text[0] if pairs else text for text in texts],  # type: ignore[misc]
        pair_texts=[text[1] for text in texts] if pairs else None,
        labels=None,
        skipped=[],
        path=Path("texts"),
    )


def check_unicode(position: int, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = quoted(text[error.start])
        raise UserError(
            f"texts[{position}], character {error.start + 1}: {found} is half of a surrogate pair, no character; fix "
            "or replace it"
        ) from None


def table(task: TaskConfig, scores: Scores) -> tuple[list[str], Iterable[list[str]]]:
    """Return the columns id, predicted and, for classes, p_<class>, and their lines.

    Class names are the recipe's label_names, or the class ids if it has none.
    """
    probabilities = _probabilities(task, scores.scores)
    names = [_name(task, label) for label in range(probabilities.shape[1])]
    lines = (
        [row_id, value, *(f"{probability:.6f}" for probability in row)]
        for row_id, value, row in zip(scores.dataset.ids, texts(task, scores.scores), probabilities, strict=True)
    )
    return ["id", "predicted", *(f"p_{name}" for name in names)], lines


def texts(task: TaskConfig, scores: np.ndarray) -> list[str]:
    if task.type == "regression":
        return [f"{value:.6f}" for value in scores]
    return [_name(task, int(label)) for label in predicted_labels(task, scores)]


def _name(task: TaskConfig, label: int) -> str:
    return task.label_names[label] if task.label_names else str(label)


def _probabilities(task: TaskConfig, scores: np.ndarray) -> np.ndarray:
    """Return the probabilities of all classes, float [n, classes]; for regression [n, 0]."""
    if task.type == "regression":
        return np.empty((len(scores), 0))
    return np.stack([1 - scores, scores], axis=1) if task.type == "binary" else scores


def summary(task: TaskConfig, scores: Scores) -> Summary:
    labels = scores.labels
    assert labels is not None
    if task.type == "regression":
        return Summary(scatter=_sample(scores.scores, labels), errors=_largest_errors(scores, labels))
    counts = confusion(task, scores.scores, labels)
    names = [_name(task, label) for label in range(len(counts))]
    return Summary(names, counts.tolist(), per_label=per_class(names, counts), errors=_wrong_rows(task, scores, labels))


def per_class(names: Sequence[str], counts: np.ndarray) -> Table:
    """Return precision, recall, F1 and support of each class, from a confusion matrix [C, C].

    Precision is 0 for a class that is never predicted, recall for one without rows.
    """
    right, support, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    values = right / predicted.clip(1), right / support.clip(1), 2 * right / (support + predicted).clip(1)
    rows = [
        [shown(name), *(f"{value:.3f}" for value in of_class), f"{number:,}"]
        for name, *of_class, number in zip(names, *values, support.tolist(), strict=True)
    ]
    return Table(["class", "precision", "recall", "F1", "rows"], rows)


def _wrong_rows(task: TaskConfig, scores: Scores, labels: np.ndarray) -> Table:
    """Return the wrong predictions, the least probable right class first."""
    right, predicted = labels.astype(np.int64), predicted_labels(task, scores.scores)
    probabilities, every = _probabilities(task, scores.scores), np.arange(len(labels))
    rows = [
        [
            *text_cells(scores, row),
            shown(_name(task, right[row])),
            shown(_name(task, predicted[row])),
            f"{probabilities[row, predicted[row]]:.3f}",
        ]
        for row in worst(-probabilities[every, right], predicted != right)
    ]
    return Table([*text_columns(scores), "label", "predicted", "probability"], rows)


def _largest_errors(scores: Scores, labels: np.ndarray) -> Table:
    """Return the rows whose predictions are farthest from their labels."""
    distances = np.abs(scores.scores - labels)
    rows = [
        [*text_cells(scores, row), f"{labels[row]:.3f}", f"{scores.scores[row]:.3f}"]
        for row in worst(distances, distances > 0)
    ]
    return Table([*text_columns(scores), "label", "predicted"], rows)


def _sample(scores: np.ndarray, labels: np.ndarray) -> dict[str, list[float]]:
    """Return labels and scores of at most SCATTER_POINTS rows, evenly spaced."""
    chosen = np.unique(np.linspace(0, len(scores) - 1, min(len(scores), SCATTER_POINTS)).astype(np.int64))
    return {
        "labels": [round(float(value), 4) for value in np.asarray(labels)[chosen]],
        "scores": [round(float(value), 4) for value in np.asarray(scores)[chosen]],
    }


def statistics(task: TaskConfig, dataset: TokenizedDataset) -> dict[str, float]:
    return label_statistics(task, dataset.labels)


SINGLE = InferenceType(metrics, evaluate, predictions, rows_of, table, summary, statistics)
