"""Files of predictions: a table with probabilities, and the hand-in format of CS224N."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastmtl.config import TaskConfig
from fastmtl.errors import UserError
from fastmtl.files.writing import replace_text
from fastmtl.inference.metrics import predicted_labels

# The columns' names in the project's own files, with its spelling.
CS224N_COLUMN = {
    "classification": "Predicted_Sentiment",
    "binary": "Predicted_Is_Paraphrase",
    "regression": "Predicted_Similiary",
}


def write_table(path: Path, task: TaskConfig, ids: Sequence[str], scores: np.ndarray) -> None:
    """Write a CSV file: id, predicted and, for classes, the probabilities p_<class>.

    scores: the output of `MultiTaskModel.predict`. Class names are the recipe's label_names, or the
    class ids if it has none. Raises UserError if the file cannot be written.
    """
    rows = io.StringIO()
    writer = csv.writer(rows, lineterminator="\n")
    probabilities = _probabilities(task, scores)
    names = [_name(task, label) for label in range(probabilities.shape[1])]
    writer.writerow(["id", "predicted", *(f"p_{name}" for name in names)])
    for row_id, value, row in zip(ids, _texts(task, scores), probabilities, strict=True):
        writer.writerow([row_id, value, *(f"{probability:.6f}" for probability in row)])
    _write(path, rows.getvalue())


def write_cs224n(path: Path, task: TaskConfig, ids: Sequence[str], scores: np.ndarray) -> None:
    """Write a file in the hand-in format of CS224N's default project (minBERT).

    It has a header `id \\t Predicted_...` and lines `id , value`. Raises UserError if the file
    cannot be written.
    """
    lines = [f"id \t {CS224N_COLUMN[task.type]} \n"]
    lines.extend(f"{row_id} , {value} \n" for row_id, value in zip(ids, _texts(task, scores), strict=True))
    _write(path, "".join(lines))


def _texts(task: TaskConfig, scores: np.ndarray) -> list[str]:
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


def _write(path: Path, text: str) -> None:
    try:
        replace_text(path, text)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
