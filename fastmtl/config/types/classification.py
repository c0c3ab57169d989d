"""Task type classification: one of several classes per row."""

from __future__ import annotations

from fastmtl.config.types.spec import Task, TypeSpec, may_bring_names


def check(task: Task) -> None:
    if task.label_names is not None and task.num_labels is None:
        object.__setattr__(task, "num_labels", len(task.label_names))
    if task.num_labels is None and not may_bring_names(task):
        raise ValueError("a classification task needs num_labels (or label_names)")
    if task.label_names is not None and len(task.label_names) != task.num_labels:
        raise ValueError(f"label_names has {len(task.label_names)} names, num_labels says {task.num_labels}")


CLASSIFICATION = TypeSpec("cross_entropy", lambda task: "accuracy", check, ("text", "text_pair", "label"))
