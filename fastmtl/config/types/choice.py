"""Task type choice: one of K texts, where K may differ from row to row."""

from __future__ import annotations

from fastmtl.config.types.spec import Task, TypeSpec, check_no_names, check_not_augmented


def check(task: Task) -> None:
    check_no_names(task, "a task of type choice has texts to choose from, no names")
    if task.pairs == "bi":
        raise ValueError("pairs: bi does not go with type choice: its texts are encoded with the question")
    check_not_augmented(task)


CHOICE = TypeSpec("cross_entropy", lambda task: "accuracy", check, ("text", "choices", "label"), "sequences")
