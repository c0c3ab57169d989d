"""Task type ranking: an order of a query's candidates, learned from graded ones."""

from __future__ import annotations

from pydantic import Field

from fastmtl.config.base import Int, Section
from fastmtl.config.types.spec import Task, TypeSpec, check_no_names, check_not_augmented


class RankingConfig(Section):
    """Settings of a task of type ranking."""

    k: Int = Field(10, ge=1, description="candidates that nDCG@k and recall@k count")


def check(task: Task) -> None:
    check_no_names(task, "a task of type ranking has grades, no names")
    check_not_augmented(task)


RANKING = TypeSpec(
    "listwise",
    lambda task: "ndcg",
    check,
    ("text", "text_pair", "group", "label"),
    "sequences",
    "ranking",
)
