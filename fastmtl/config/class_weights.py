"""Checks of a task's keys class_weights, label_smoothing and focal_gamma."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from fastmtl.config.types.spec import may_bring_names
from fastmtl.errors import listed, quoted
from fastmtl.files.label_text import as_label

BALANCED = "balanced"
WITH_CLASSES = ("classification", "binary", "tokens", "multilabel")
WEIGHTED = ("cross_entropy", "bce", "focal", "ordinal")
SMOOTHED = ("cross_entropy", "bce")


class Task(Protocol):
    """The keys of a task (fastmtl.config.TaskConfig) that the checks read."""

    type: Any
    label_names: Any
    num_labels: Any
    data: Any
    class_weights: Any
    label_smoothing: Any
    focal_gamma: Any

    @property
    def losses(self) -> Mapping[str, float]: ...


def check_class_weights(task: Task) -> None:
    """Raise ValueError for a key that does not fit the task's type or losses."""
    _check_place(task, "class_weights", task.class_weights is not None, WITH_CLASSES, WEIGHTED)
    _check_place(task, "label_smoothing", bool(task.label_smoothing), (*WITH_CLASSES, "choice"), SMOOTHED)
    if task.focal_gamma != 2.0 and "focal" not in task.losses:
        raise ValueError(f"focal_gamma: a setting of the loss focal; this task has {' + '.join(task.losses)}")
    if task.class_weights == BALANCED and task.data.augment is not None:
        raise ValueError("class_weights: balanced does not go with data.augment, which makes the classes equally large")
    if task.label_names is not None or not may_bring_names(task):  # names that the rows bring are checked with them
        class_weights(task)


def _check_place(task: Task, key: str, given: bool, types: tuple[str, ...], losses: tuple[str, ...]) -> None:
    if given and task.type not in types:
        raise ValueError(f"{key}: for tasks with classes ({', '.join(types)}), this one is of type {task.type}")
    if given and not set(losses) & task.losses.keys():
        raise ValueError(f"{key}: for the losses {', '.join(losses)}; this task has {' + '.join(task.losses)}")


def class_weights(task: Task) -> list[float] | None:
    """Return the weight of each class; None without weights, and while they are `balanced`.

    They have the order of the class ids, [C]: of both classes for binary, of the tags for tokens.
    For multilabel they are the weights of a row that has the label. Classes that a mapping does not
    name have weight 1. Raises ValueError for numbers that are not those of the classes.
    """
    given = task.class_weights
    if given is None or given == BALANCED:
        return None
    count = 2 if task.type == "binary" else task.num_labels
    if isinstance(given, list):
        if count is not None and len(given) != count:
            raise ValueError(f"class_weights has {len(given)} numbers for {count} classes")
        return list(given)
    names = task.label_names or [str(label) for label in range(count or 0)]
    known = {as_label(name): index for index, name in enumerate(names)}
    weights = [1.0] * len(names)
    for name, weight in given.items():
        if as_label(name) not in known:
            raise ValueError(f"class_weights: {quoted(str(name))} is none of the classes {listed(names, 12)}")
        weights[known[as_label(name)]] = weight
    return weights
