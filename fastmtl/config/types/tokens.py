"""Task type tokens: a tag per word, as for named entities and parts of speech."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fastmtl.config.base import Section
from fastmtl.config.types.spec import Task, TypeSpec, check_names, check_one_text


class TokensConfig(Section):
    """Settings of a task of type tokens."""

    subwords: Literal["first", "last", "all"] = Field(
        "first", description="the pieces of a word that get its tag: its first, its last or all"
    )
    scheme: Literal["none", "bio", "iobes"] = Field(
        "none", description="bio, iobes: the tags are O and entities with a prefix; they are checked, the metric is f1"
    )


def check(task: Task) -> None:
    check_names(task, "tags")
    check_one_text(task)


TOKENS = TypeSpec(
    "cross_entropy",
    lambda task: "accuracy" if task.tokens.scheme == "none" else "f1",
    check,
    ("words", "label"),
    "tokens",
    "tokens",
)
