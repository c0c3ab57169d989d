"""Task type tokens: a tag per word, as for named entities and parts of speech."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fastmtl.config.base import Section
from fastmtl.config.types.spec import Task, TypeSpec, check_names, check_one_text
from fastmtl.errors import quoted


class TokensConfig(Section):
    """Settings of a task of type tokens."""

    subwords: Literal["first", "last", "all"] = Field(
        "first", description="the pieces of a word that get its tag: its first, its last or all"
    )
    scheme: Literal["none", "bio", "iobes"] = Field(
        "none", description="bio, iobes: the tags are O and entities with a prefix; they are checked, the metric is f1"
    )


PREFIXES = {"bio": "BI", "iobes": "BIES"}


def split_tag(tag: str) -> tuple[str, str]:
    """Return the prefix and the entity type of a tag of a scheme: ("B", "PER"); ("O", "") of O."""
    prefix, _, kind = tag.partition("-")
    return prefix, kind


def check(task: Task) -> None:
    check_names(task, "tags")
    check_one_text(task)
    if task.tokens.scheme != "none" and task.label_names is not None:
        _check_scheme(task.label_names, task.tokens.scheme, every=task.tokens.subwords == "all")


def _check_scheme(names: list[str], scheme: str, *, every: bool) -> None:
    """Raise ValueError for tags that are not those of a scheme.

    every: whether each entity type needs all prefixes, also those that its words do not have.
    """
    prefixes = PREFIXES[scheme]
    if "O" not in names:
        raise ValueError(f"tokens.scheme: {scheme} needs the tag O in label_names, for words outside of entities")
    kinds: dict[str, str] = {}
    for name in names:
        prefix, kind = split_tag(name)
        if name != "O" and not (kind and len(prefix) == 1 and prefix in prefixes):
            wanted = ", ".join(f"{one}-<type>" for one in prefixes)
            raise ValueError(f"label_names: {quoted(name)} is no tag of the scheme {scheme}, which has O, {wanted}")
        kinds[kind] = kinds.get(kind, "") + prefix
    del kinds[""]
    for kind, found in kinds.items():
        if scheme == "bio" and "B" not in found:
            raise ValueError(f"label_names: I-{kind} without B-{kind}, with which an entity of the scheme bio begins")
        missing = next((one for one in prefixes if one not in found), None)
        if every and missing:
            raise ValueError(
                f"tokens.subwords: all gives further pieces of a word the other tags of its entity: add "
                f"{missing}-{kind} to label_names"
            )


TOKENS = TypeSpec(
    "cross_entropy",
    lambda task: "accuracy" if task.tokens.scheme == "none" else "f1",
    check,
    ("words", "label"),
    "tokens",
    "tokens",
)
