"""Task type ranking: an order of a query's candidates, learned from graded ones."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fastmtl.config.base import Int, Section
from fastmtl.config.types.spec import Task, TypeSpec, check_no_names, check_not_augmented, check_one_label

COSINE_SCALE = 20.0  # as in the loss mnr: a softmax of bare cosines is nearly uniform


class RankingConfig(Section):
    """Settings of a task of type ranking."""

    k: Int = Field(10, ge=1, description="candidates that nDCG@k and recall@k count")
    gains: Literal["linear", "exponential"] = Field(
        "linear", description="gain of grade g in nDCG: g, or 2^g - 1, whose grades are at most 30"
    )
    scale: float | None = Field(
        None,
        gt=0,
        description="of the scores in the losses listwise and pairwise; default: 20 for the head cosine, else 1",
    )
    margin: float = Field(0.2, gt=0, description="triplet: by how much a better candidate's score should be larger")

    def scale_for(self, head: str) -> float:
        """Return the scale of the scores of the head of this name."""
        return self.scale or (COSINE_SCALE if head == "cosine" else 1.0)


def check(task: Task) -> None:
    check_no_names(task, "a task of type ranking has grades, no names")
    check_one_label(task)
    check_not_augmented(task)
    columns = task.data.columns
    for role in ("text_pair", "group"):
        if "choices" in columns and role in columns:
            raise ValueError(
                f"data.columns.{role}: with choices, each row of the file has all candidates of a query; without, a "
                "candidate. Name one of the two"
            )
    if "choices" not in columns and "id" in columns:
        raise ValueError("data.columns.id: the id of a group of candidates is the content of the column group")
    if "mnr" in task.losses and task.pairs != "bi":
        raise ValueError("loss: mnr compares the vectors of query and candidates: it needs pairs: bi, not pairs: cross")
    if task.mnr.cached:
        raise ValueError("mnr.cached: not for tasks of type ranking; leave it out")


RANKING = TypeSpec(
    "listwise",
    lambda task: "ndcg",
    check,
    ("text", "text_pair", "group", "label", "choices"),
    "sequences",
    "ranking",
)
