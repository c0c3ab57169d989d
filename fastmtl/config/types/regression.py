"""Task type regression: a number per row."""

from __future__ import annotations

from fastmtl.config.types.spec import Task, TypeSpec


def check(task: Task) -> None:
    if task.label_names is not None:
        raise ValueError("label_names: a regression task has numbers, no names")
    if task.range is None:
        raise ValueError("a regression task needs range: [smallest, largest] (labels outside it are bad rows)")
    if task.data.augment is not None:
        raise ValueError("data.augment makes all classes equally large; a regression task has none")


REGRESSION = TypeSpec("mse", lambda task: "pearson", check, ("text", "text_pair", "label"))
