"""Task type multilabel: any subset of the labels per row."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fastmtl.config.base import Section
from fastmtl.config.types.spec import Task, TypeSpec, check_names, check_not_augmented
from fastmtl.errors import quoted

Share = Annotated[float, Field(gt=0, lt=1)]


class MultilabelConfig(Section):
    """Settings of a task of type multilabel."""

    separator: str = Field(",", min_length=1, description="between the labels of a cell")
    thresholds: Literal["tuned"] | Share | list[Share] = Field(
        0.5,
        description="the least probability of a predicted label, or one for each label; tuned: per label, the one "
        "with the best F1 on the dev rows",
    )


def check(task: Task) -> None:
    columns = task.data.columns.get("label")
    if isinstance(columns, list):
        _check_indicators(task, columns)
    check_names(task, "labels")
    check_not_augmented(task)
    if task.label_names is None:  # the rows bring them
        return
    separator, thresholds = task.multilabel.separator, task.multilabel.thresholds
    for name in task.label_names:
        if separator in name:
            raise ValueError(
                f"label_names: {quoted(name)} contains {quoted(separator)}, which is between the labels of a cell: set "
                "multilabel.separator"
            )
    if isinstance(thresholds, list) and len(thresholds) != len(task.label_names):
        raise ValueError(f"multilabel.thresholds has {len(thresholds)} numbers for {len(task.label_names)} labels")


def _check_indicators(task: Task, columns: list[str | int]) -> None:
    """Raise ValueError for unusable indicator columns; set label_names to the columns' names."""
    if len(set(columns)) < len(columns):
        raise ValueError(f"data.columns.label: {columns}: name each column once")
    if task.label_names is None:
        if not all(isinstance(column, str) for column in columns):
            raise ValueError("data.columns.label has numbers of columns: give the labels' names in label_names")
        object.__setattr__(task, "label_names", list(columns))
    if len(task.label_names) != len(columns):
        raise ValueError(
            f"label_names has {len(task.label_names)} names for the {len(columns)} columns of data.columns.label"
        )


MULTILABEL = TypeSpec("bce", lambda task: "micro_f1", check, ("text", "text_pair", "label"), section="multilabel")
