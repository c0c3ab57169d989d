"""Task type multilabel: any subset of the labels per row."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fastmtl.config.base import Section
from fastmtl.config.types.spec import Task, TypeSpec, check_names, check_not_augmented


class MultilabelConfig(Section):
    """Settings of a task of type multilabel."""

    separator: str = Field(",", min_length=1, description="between the labels of a cell")
    thresholds: Literal["tuned"] | float = Field(
        0.5, description="the least probability of a predicted label; tuned: per label, the best on the dev rows"
    )


def check(task: Task) -> None:
    check_names(task, "labels")
    check_not_augmented(task)


MULTILABEL = TypeSpec("bce", lambda task: "micro_f1", check, ("text", "text_pair", "label"), section="multilabel")
