"""Evaluation and predictions of type multilabel: a set of labels per row."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fastmtl.config import TaskConfig
from fastmtl.data.tokenized import TokenizedDataset
from fastmtl.errors import UserError
from fastmtl.inference.metrics import check_finite
from fastmtl.inference.scores import Scores
from fastmtl.inference.types.single import rows_of
from fastmtl.inference.types.spec import InferenceType, Summary, Table
from fastmtl.inference.types.texts import text_cells, text_columns, worst

METRICS = ("micro_f1", "macro_f1", "accuracy", "map", "roc_auc")
DEFAULT_THRESHOLD = 0.5


@dataclass(frozen=True)
class LabelsPrediction:
    """The prediction for one row.

    labels: names of the labels whose probability reaches their threshold, in the recipe's order.
    probabilities: {label: its probability} of all labels.
    """

    labels: list[str]
    probabilities: dict[str, float]


def thresholds(task: TaskConfig, scores: Scores) -> np.ndarray:
    """Return the least probability of each label's prediction, float64 [C].

    `tuned` gives those of `tuned_thresholds` for these scores. Raises UserError for `tuned` without
    labels.
    """
    given = task.multilabel.thresholds
    if given == "tuned":
        return tuned_thresholds(scores.scores, _labels(scores))
    return np.broadcast_to(np.asarray(given, dtype=np.float64), scores.scores.shape[1:])


def tuned_thresholds(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return for each label the threshold with the largest F1 on these rows, float64 [C].

    A threshold is the middle between two neighbouring probabilities of the label; of equally good
    thresholds it is the one nearest to 0.5. A label without a row that has it gets 0.5.
    scores: float32 [n, C]. labels: [n, C], 0 or 1.
    """
    return np.array([_tuned(p, y) for p, y in zip(scores.T.astype(np.float64), labels.T, strict=True)])


def _tuned(p: np.ndarray, y: np.ndarray) -> float:
    positives = int(y.sum())
    if not positives:
        return DEFAULT_THRESHOLD
    order = np.argsort(-p, kind="stable")
    p, found = p[order], np.cumsum(y[order])
    last = np.flatnonzero(np.diff(p, append=-1.0))  # the last row of each value: rows up to it are predicted
    f1 = 2 * found[last] / (last + 1 + positives)
    middle = (p[last] + np.append(p[last[1:]], 0.0)) / 2
    best = middle[f1 == f1.max()]
    return float(best[np.abs(best - DEFAULT_THRESHOLD).argmin()])


def evaluate(task: TaskConfig, scores: Scores) -> dict[str, float]:
    """Return the metrics; those of scikit-learn's functions of these names.

    map and roc_auc are means over the labels that some rows have, and for roc_auc some have not; 0
    if there is no such label. accuracy is the share of rows whose labels are all predicted right.
    """
    from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

    y, p = _labels(scores), scores.scores
    check_finite(p)
    predicted = p >= thresholds(task, scores)
    there, lacking = y.any(axis=0), ~y.all(axis=0)
    ranked, both = np.flatnonzero(there), np.flatnonzero(there & lacking)
    return {
        "micro_f1": float(f1_score(y, predicted, average="micro", zero_division=0)),
        "macro_f1": float(f1_score(y, predicted, average="macro", zero_division=0)),
        "accuracy": float((predicted == y).all(axis=1).mean()),
        "map": float(np.mean([average_precision_score(y[:, c], p[:, c]) for c in ranked])) if len(ranked) else 0.0,
        "roc_auc": float(np.mean([roc_auc_score(y[:, c], p[:, c]) for c in both])) if len(both) else 0.0,
    }


def predictions(task: TaskConfig, scores: Scores) -> list[LabelsPrediction]:
    names, predicted = _names(task), scores.scores >= thresholds(task, scores)
    return [
        LabelsPrediction(_chosen(names, row), dict(zip(names, map(float, values), strict=True)))
        for row, values in zip(predicted, scores.scores, strict=True)
    ]


def table(task: TaskConfig, scores: Scores) -> tuple[list[str], Iterable[list[str]]]:
    """Return the columns id, predicted (the names, separated) and p_<label>, and their lines."""
    names, predicted = _names(task), scores.scores >= thresholds(task, scores)
    lines = (
        [row_id, task.multilabel.separator.join(_chosen(names, row)), *(f"{value:.6f}" for value in values)]
        for row_id, row, values in zip(scores.dataset.ids, predicted, scores.scores, strict=True)
    )
    return ["id", "predicted", *(f"p_{name}" for name in names)], lines


def summary(task: TaskConfig, scores: Scores) -> Summary:
    from sklearn.metrics import average_precision_score, precision_recall_fscore_support

    names, y, p, least = _names(task), _labels(scores), scores.scores, thresholds(task, scores)
    predicted = p >= least
    per_label = precision_recall_fscore_support(y, predicted, average=None, zero_division=0)
    rows = []
    for c, (name, precision, recall, f1, support) in enumerate(zip(names, *per_label, strict=True)):
        average = f"{average_precision_score(y[:, c], p[:, c]):.3f}" if support else "–"
        rows.append([name, *(f"{x:.3f}" for x in (precision, recall, f1)), average, str(support), f"{least[c]:.3f}"])
    head = ["label", "precision", "recall", "F1", "average precision", "rows", "threshold"]
    return Summary(names, per_label=Table(head, rows), errors=_errors(task, scores, predicted))


def _errors(task: TaskConfig, scores: Scores, predicted: np.ndarray) -> Table:
    """Return the wrong rows whose labels have the smallest probability, the worst first."""
    names, y, p = _names(task), _labels(scores), scores.scores.astype(np.float64)
    probability = np.where(y > 0, p, 1 - p).prod(axis=1)
    rows = []
    for i in worst(-probability, (predicted != y).any(axis=1)):
        sets = [", ".join(_chosen(names, row)) or "–" for row in (y[i], predicted[i])]
        rows.append([*text_cells(scores, i), *sets, f"{probability[i]:.3g}"])
    return Table([*text_columns(scores), "labels", "predicted", "probability of the labels"], rows)


def statistics(task: TaskConfig, dataset: TokenizedDataset) -> dict[str, float]:
    """Return the share of the rows that have each label."""
    assert dataset.labels is not None
    shares = dataset.labels.mean(axis=0, dtype=np.float64)
    return {name: round(float(share), 4) for name, share in zip(_names(task), shares, strict=True)}


def _labels(scores: Scores) -> np.ndarray:
    if scores.labels is None:
        raise UserError(f"{scores.dataset.path}: there are no labels to evaluate against")
    return np.asarray(scores.labels)


def _names(task: TaskConfig) -> list[str]:
    assert task.label_names is not None
    return task.label_names


def _chosen(names: list[str], row: np.ndarray) -> list[str]:
    return [name for name, there in zip(names, row, strict=True) if there]


MULTILABEL = InferenceType(lambda task: METRICS, evaluate, predictions, rows_of, table, summary, statistics)
