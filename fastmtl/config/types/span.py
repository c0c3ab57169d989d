"""Task type span: the part of a context that answers a question, or no answer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fastmtl.config.base import Int, Section
from fastmtl.config.types.spec import Task, TypeSpec, check_no_names, check_one_text


class SpanConfig(Section):
    """Settings of a task of type span."""

    stride: Int = Field(128, ge=0, description="tokens that two windows of a long context share")
    max_question: Int = Field(64, ge=1, description="tokens of the longest question; longer ones are cut")
    max_answer: Int = Field(30, ge=1, description="tokens of the longest answer")
    unanswerable: bool = Field(False, description="whether a question may have no answer in its context")
    no_answer_threshold: Literal["tuned"] | float = Field(
        0.0,
        description="no answer is predicted if its score is larger than the best answer's by more than this; tuned: "
        "the number with the best F1 on the dev rows",
    )


def check(task: Task) -> None:
    check_no_names(task, "a task of type span has answers in the text, no names")
    check_one_text(task)
    threshold = task.span.no_answer_threshold
    if threshold != 0 and not task.span.unanswerable:
        raise ValueError(f"span.no_answer_threshold: {threshold} is for span.unanswerable: true")


SPAN = TypeSpec(
    "cross_entropy",
    lambda task: "f1",
    check,
    ("text", "text_pair", "answers", "answer", "answer_start"),
    "tokens",
    "span",
)
