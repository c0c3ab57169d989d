"""Weights of classes from the labels of the training rows, for `class_weights: balanced`."""

from __future__ import annotations

import numpy as np

from fastmtl.config import Recipe, TaskConfig
from fastmtl.config.class_weights import BALANCED
from fastmtl.data.corpus import CorpusRows
from fastmtl.errors import UserError, quoted


def with_class_weights(recipe: Recipe, rows: CorpusRows) -> Recipe:
    """Return the recipe with numbers instead of `class_weights: balanced`.

    rows: those of the recipe's files, before `take`. Raises UserError for a class without a row.
    """
    tasks = dict(recipe.tasks)
    for name, task in recipe.tasks.items():
        if task.class_weights == BALANCED:
            labels = rows.labels(name)
            assert labels is not None, "training rows have labels"
            try:
                tasks[name] = task.model_copy(update={"class_weights": balanced(task, labels)})
            except UserError as error:
                raise UserError(f"tasks.{name}.class_weights: balanced: {error}") from None
    return recipe.model_copy(update={"tasks": tasks}) if tasks != recipe.tasks else recipe


def balanced(task: TaskConfig, labels: np.ndarray) -> list[float]:
    """Return the weight of each class: n / (C n_c) for n labels, n_c of them of the class c of C.

    It is that of scikit-learn's compute_class_weight. For multilabel it is the number of rows
    without the label divided by the number of rows that have it. labels: as in Rows; words without
    a label do not count. Raises UserError for a class without a label.
    """
    if task.type == "multilabel":
        counts = labels.sum(axis=0, dtype=np.float64)
        weights = (len(labels) - counts) / np.maximum(counts, 1)
    else:
        ids = labels.astype(np.int64)
        classes = 2 if task.type == "binary" else task.num_labels or 0
        counts = np.bincount(ids[ids >= 0], minlength=classes).astype(np.float64)
        weights = counts.sum() / (classes * np.maximum(counts, 1))
    for index in np.flatnonzero((counts == 0) | (weights == 0)).tolist():
        name = quoted(task.label_names[index]) if task.label_names else f"{index}"
        which = "no training row has" if not counts[index] else "every training row has"
        raise UserError(f"{which} the class {name}: give the weights as numbers")
    return weights.tolist()
