"""Metrics: accuracy, macro precision, recall and F1, Pearson, Spearman and mean squared error.

Scores are the output of `MultiTaskModel.predict` for E rows: class probabilities float [E, C]
(classification), the probability of class 1 float [E] (binary), the predicted value float [E]
(regression).
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import numpy as np

from fastmtl.config import TaskConfig
from fastmtl.errors import UserError


def load_libraries() -> None:
    """Import scipy and scikit-learn.

    They take about 70 MiB, which a training process should allocate before its first step.
    """
    for name in ("scipy.stats", "sklearn.metrics"):
        importlib.import_module(name)


CLASS_METRICS = ("accuracy", "macro_precision", "macro_recall", "macro_f1")
REGRESSION_METRICS = ("pearson", "spearman", "mse")
LOWER_IS_BETTER = ("mse",)


def predicted_labels(task: TaskConfig, scores: np.ndarray) -> np.ndarray:
    """Return the predicted class ids, int64 [E]; for regression return `scores`.

    A binary probability of exactly 0.5 is class 1.
    """
    if task.type == "classification":
        return scores.argmax(axis=1).astype(np.int64)
    if task.type == "binary":
        return (scores >= 0.5).astype(np.int64)
    return scores


def evaluate_predictions(task: TaskConfig, scores: np.ndarray, labels: Any) -> dict[str, float]:
    """Return {metric: value} for all metrics of the task's type.

    labels: [E], class ids or values. Classes that are neither in the labels nor in the predictions
    do not count in macro averages. A class that is never predicted has precision 0. Constant
    predictions or labels have correlation 0. The mse is in squared label units.
    Raises UserError if there are no rows or a score is not finite.
    """
    labels = np.asarray(labels)
    if len(labels) == 0:
        raise UserError("there are no rows to evaluate")
    if len(labels) != len(scores):
        raise ValueError(f"{len(scores)} predictions for {len(labels)} labels")
    check_finite(scores)
    if task.type == "regression":
        return _regression(scores.astype(np.float64), labels.astype(np.float64))
    return _classes(predicted_labels(task, scores), labels.astype(np.int64))


def check_finite(scores: np.ndarray) -> None:
    """Raise UserError for scores [n, ...] that are not finite."""
    broken = int((~np.isfinite(scores)).reshape(len(scores), -1).any(axis=1).sum())
    if broken:
        raise UserError(
            f"{broken} of {len(scores)} predictions are not finite: the training diverged; lower optimizer.lr, "
            "or raise schedule.warmup, or use engine.precision=bf16 instead of fp16"
        )


def confusion(task: TaskConfig, scores: np.ndarray, labels: Any) -> np.ndarray:
    """Return the confusion matrix int64 [C, C] of a classification or binary task.

    Rows are the true classes, columns the predicted ones.
    """
    from sklearn.metrics import confusion_matrix

    classes = np.arange(2 if task.type == "binary" else task.num_labels or 0)
    return confusion_matrix(np.asarray(labels).astype(np.int64), predicted_labels(task, scores), labels=classes)


def label_statistics(task: TaskConfig, labels: Any) -> dict[str, float]:
    """Return the number of labels of each class, {class id: number}.

    For regression return the labels' mean, standard deviation ("deviation"), smallest and largest
    value.
    """
    labels = np.asarray(labels)
    if task.type != "regression":
        num_classes = 2 if task.type == "binary" else task.num_labels or 0
        return {str(k): int(n) for k, n in enumerate(np.bincount(labels.astype(np.int64), minlength=num_classes))}
    values = {"mean": labels.mean(), "deviation": labels.std(), "smallest": labels.min(), "largest": labels.max()}
    return {name: round(float(value), 4) for name, value in values.items()}


def _classes(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    from sklearn.metrics import precision_recall_fscore_support

    precision, recall, f1, _ = precision_recall_fscore_support(labels, predicted, average="macro", zero_division=0)
    return {
        "accuracy": float((predicted == labels).mean()),
        "macro_precision": float(precision),
        "macro_recall": float(recall),
        "macro_f1": float(f1),
    }


def _regression(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    from scipy import stats

    def correlation(measure: Any) -> float:
        if len(labels) < 2 or np.ptp(scores) == 0 or np.ptp(labels) == 0:
            return 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.ConstantInputWarning)
            warnings.simplefilter("ignore", stats.NearConstantInputWarning)
            value = float(measure(scores, labels)[0])
        return value if np.isfinite(value) else 0.0

    return {
        "pearson": correlation(stats.pearsonr),
        "spearman": correlation(stats.spearmanr),
        "mse": float(np.mean((scores - labels) ** 2)),
    }
