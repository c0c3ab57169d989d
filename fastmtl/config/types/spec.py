"""The description of a task type for the checks of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol


class Task(Protocol):
    """The keys of a task (fastmtl.config.TaskConfig) that the checks of its type read."""

    type: Any
    label_names: Any
    num_labels: Any
    range: Any
    data: Any
    pairs: Any
    pooling: Any
    tokens: Any
    span: Any
    multilabel: Any
    choice: Any
    ranking: Any
    mnr: Any

    @property
    def losses(self) -> Any: ...


@dataclass(frozen=True)
class TypeSpec:
    """A task type.

    loss: name of the default loss. metric: function that returns the name of the default metric.
    check: function that raises ValueError for settings that do not fit the type.
    roles: keys of `data.columns` that the type reads; `id` goes with every type.
    scores: what the head scores: "rows" for one output per row, "tokens" for one per token of
    a row's sequence, "sequences" for one per sequence of a row.
    section: name of the task's section with settings of this type only, or None.
    """

    loss: str
    metric: Callable[[Task], str]
    check: Callable[[Task], None]
    roles: tuple[str, ...]
    scores: Literal["rows", "tokens", "sequences"] = "rows"
    section: str | None = None


def check_no_names(task: Task, why: str) -> None:
    """Raise ValueError if a task has label_names or num_labels. why: the reason in the message."""
    for key in ("label_names", "num_labels"):
        if getattr(task, key) is not None:
            raise ValueError(f"{key}: {why}")


# Endings of files of text, whose labels bring no names of classes.
_TEXT = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".ndjson", ".conll", ".conllu", ".gz")


class WithFiles(Protocol):
    """A task's files (fastmtl.config.FileConfig)."""

    data: Any


def may_bring_names(task: WithFiles) -> bool:
    """Return whether a task's training rows may bring the names of their classes.

    Parquet and Arrow files, saved data sets and objects from Python may.
    """
    return any(not name.lower().endswith(_TEXT) for name in task.data.names("train"))


def check_names(task: Task, what: str) -> None:
    """Raise ValueError unless a task has two label_names or more; set num_labels to their number.

    A task may lack the names if its training rows may bring them.
    what: the names' kind in the message, such as "tags".
    """
    if task.label_names is None and may_bring_names(task):
        return
    if not task.label_names or len(task.label_names) < 2:
        raise ValueError(f"a task of type {task.type} needs label_names, its {what}: at least two")
    if task.num_labels not in (None, len(task.label_names)):
        raise ValueError(f"label_names has {len(task.label_names)} names, num_labels says {task.num_labels}")
    object.__setattr__(task, "num_labels", len(task.label_names))


def check_one_text(task: Task) -> None:
    """Raise ValueError if a task has `pairs: bi`, a pooling or an augmentation."""
    if task.pairs == "bi":
        raise ValueError(f"pairs: bi does not go with type {task.type}: leave it out")
    if task.pooling != "cls":
        raise ValueError(f"pooling: a task of type {task.type} reads the states of tokens: leave it out")
    check_not_augmented(task)


def check_one_label(task: Task) -> None:
    """Raise ValueError if `data.columns` names several columns for the label."""
    if isinstance(task.data.columns.get("label"), list):
        raise ValueError(f"data.columns.label: a task of type {task.type} has one column of labels")


def check_not_augmented(task: Task) -> None:
    if task.data.augment is not None:
        raise ValueError(f"data.augment makes rows of classes equally many; it does not go with type {task.type}")
