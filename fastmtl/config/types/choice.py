"""Task type choice: one of K texts, where K may differ from row to row."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fastmtl.config.base import Section
from fastmtl.config.types.spec import Task, TypeSpec, check_no_names, check_not_augmented, check_one_label


class ChoiceConfig(Section):
    """Settings of a task of type choice."""

    labels: Literal["auto", "from_0", "from_1", "letters", "texts"] = Field(
        "auto",
        description="what a label is: the right text's number from 0 or from 1, its letter from A, or the text; "
        "auto: a file's labels decide, except for from_1",
    )


def check(task: Task) -> None:
    check_no_names(task, "a task of type choice has texts to choose from, no names")
    check_one_label(task)
    if task.pairs == "bi":
        raise ValueError("pairs: bi does not go with type choice: its texts are encoded with the question")
    check_not_augmented(task)


CHOICE = TypeSpec("cross_entropy", lambda task: "accuracy", check, ("text", "choices", "label"), "sequences", "choice")
