"""Task type binary: class 0 or 1 per row."""

from __future__ import annotations

from fastmtl.config.types.spec import Task, TypeSpec
from fastmtl.errors import listed


def check(task: Task) -> None:
    if len(task.label_names or "no") != 2:
        raise ValueError(f"a binary task has two label_names, these are {listed(task.label_names or ())}")


BINARY = TypeSpec("bce", lambda task: "accuracy", check, ("text", "text_pair", "label"))
