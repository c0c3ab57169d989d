"""The metrics of a recipe's tasks, and the values by which a run keeps its best weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from fastmtl.config import Recipe, TaskConfig
from fastmtl.errors import UserError, unknown_name
from fastmtl.inference.metrics import LOWER_IS_BETTER
from fastmtl.inference.scores import Scores
from fastmtl.inference.types import INFERENCE_TYPES
from fastmtl.inference.types.multilabel import thresholds
from fastmtl.inference.types.span import no_answer_threshold


def metric_names(task: TaskConfig) -> tuple[str, ...]:
    """Return the names of all metrics of the task's type, in the order of a table's columns."""
    return INFERENCE_TYPES[task.type].metrics(task)


def evaluate_scores(task: TaskConfig, scores: Scores) -> dict[str, float]:
    """Return {metric: value} for all metrics of the task's type.

    Raises UserError if there are no rows or labels, or a score is not finite.
    """
    return INFERENCE_TYPES[task.type].evaluate(task, scores)


# The setting of a task type that may be "tuned", and the function that finds its value.
_TUNABLE: dict[str, tuple[str, Callable[[TaskConfig, Scores], float | np.ndarray]]] = {
    "multilabel": ("thresholds", thresholds),
    "span": ("no_answer_threshold", no_answer_threshold),
}


def tuned_setting(task: TaskConfig) -> str | None:
    """Return the setting whose value is "tuned", as `multilabel.thresholds`; None without one."""
    key, _ = _TUNABLE.get(task.type, ("", None))
    return f"{task.type}.{key}" if key and getattr(getattr(task, task.type), key) == "tuned" else None


def with_thresholds(recipe: Recipe, scored: Mapping[str, Scores]) -> Recipe:
    """Return the recipe with numbers for settings that are "tuned", for a saved model.

    scored: {task: scores of its dev rows}; a task without scores keeps the word.
    """
    tasks = dict(recipe.tasks)
    for name, scores in scored.items():
        task = tasks[name]
        if tuned_setting(task) is not None:
            key, find = _TUNABLE[task.type]
            value = np.asarray(find(task, scores)).tolist()
            section = getattr(task, task.type).model_copy(update={key: value})
            tasks[name] = task.model_copy(update={task.type: section})
    return recipe.model_copy(update={"tasks": tasks})


def check_metrics(recipe: Recipe) -> None:
    """Raise UserError if the recipe names a metric that its task does not have.

    The message names the key and the nearest valid name. Called before training.
    """
    for name, task in recipe.tasks.items():
        tuned = tuned_setting(task)
        if tuned is not None and not recipe.data.has_dev(task.data):
            raise UserError(
                f"tasks.{name}.{tuned}: tuned needs dev rows: name a file as tasks.{name}.data.dev, or set "
                "data.dev_fraction"
            )
        valid = [metric for metric in metric_names(task) if metric not in LOWER_IS_BETTER]
        if task.metric_name not in valid:
            why = unknown_name(f"metric of a {task.type} task", task.metric_name, valid)
            raise UserError(f"tasks.{name}.metric: {why} (The mean over tasks needs metrics where more is better.)")
    wanted = recipe.early_stopping.metric
    choices = ["mean", *(f"{name}/{metric}" for name, task in recipe.tasks.items() for metric in metric_names(task))]
    if wanted not in choices:
        raise UserError(f"early_stopping.metric: {unknown_name('metric', wanted, choices)}")


def check_early_stopping(recipe: Recipe) -> None:
    """Raise UserError if there is no dev file for the metric of early stopping.

    The message names the key. Called before training.
    """
    wanted, patience = recipe.early_stopping.metric, recipe.early_stopping.patience
    scored = [name for name, task in recipe.tasks.items() if recipe.data.has_dev(task.data)]
    if wanted == "mean":
        if patience is not None and not scored:
            raise UserError(
                f"early_stopping.patience: {patience}, but no task has a dev file, so there is no metric to stop by: "
                "name one as tasks.<task>.data.dev, set data.dev_fraction, or leave patience out"
            )
        return
    task = wanted.rsplit("/", 1)[0]
    if task not in scored:
        raise UserError(
            f"early_stopping.metric: {wanted}: task {task} has no dev file: name one as tasks.{task}.data.dev, "
            "or choose another metric"
        )


def mean_score(metrics: dict[str, dict[str, float]], recipe: Recipe) -> float:
    """Return the mean over tasks of each task's own metric (`tasks.<task>.metric`).

    metrics: {task: {metric: value}} of the evaluated tasks. Raises UserError if there is none.
    """
    values = [metrics[name][task.metric_name] for name, task in recipe.tasks.items() if name in metrics]
    if not values:
        raise UserError("no task of the recipe has a dev file: there is nothing to take the mean of")
    return float(np.mean(values))


def selected_score(metrics: dict[str, dict[str, float]], recipe: Recipe) -> float:
    """Return the value of `early_stopping.metric`; the greater value is always better.

    A metric of which the lower value is better (mse) is negated. Raises UserError for a task
    without a dev file.
    """
    wanted = recipe.early_stopping.metric
    if wanted == "mean":
        return mean_score(metrics, recipe)
    task, metric = wanted.rsplit("/", 1)
    if task not in metrics:
        raise UserError(f"early_stopping.metric: {wanted} is not known: task {task} has no dev file")
    return -metrics[task][metric] if metric in LOWER_IS_BETTER else metrics[task][metric]
