"""Titles and order of metrics in tables."""

from __future__ import annotations

from collections.abc import Mapping

from fastmtl.config import Recipe
from fastmtl.config.types import TYPES

NAMES = {
    "auc": "AUC",
    "f1": "F1",
    "map": "mAP",
    "mrr": "MRR",
    "mse": "MSE",
    "ndcg": "nDCG",
    "pearson": "Pearson",
    "roc": "ROC",
    "spearman": "Spearman",
}


def title_of(metric: str) -> str:
    """Return the title of a metric, such as `macro F1` for macro_f1."""
    return " ".join(NAMES.get(word, word) for word in metric.split("_"))


def metric_columns(recipe: Recipe, metrics: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return the metrics of all tasks, each once, in the order of the task types.

    metrics: {task: {metric: value}}.
    """
    order = list(TYPES)
    tasks = sorted(metrics, key=lambda task: order.index(recipe.tasks[task].type))
    return list(dict.fromkeys(name for task in tasks for name in metrics[task]))
