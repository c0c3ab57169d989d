"""Names of classes that the rows of a task bring along (Hugging Face's ClassLabel)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastmtl.config import TaskConfig
from fastmtl.data.columnar import is_columnar, open_columnar
from fastmtl.data.places import Place, Table
from fastmtl.data.sentences import TAGS
from fastmtl.errors import UserError, listed
from fastmtl.files.label_text import as_label

NAMED = ("classification", "binary", "tokens", "multilabel")  # types whose labels can have names


def opened(place: Place) -> Place:
    """Return a Parquet or Arrow file as a table, another place unchanged."""
    return open_columnar(place) if isinstance(place, Path) and is_columnar(place) else place


def check_class_names(place: Place, task: TaskConfig) -> None:
    """Raise UserError if the classes of the label column are not among the task's label_names."""
    found = names_of_labels(place, task) if task.type in NAMED and task.label_names is not None else None
    if found is None:
        return
    column, names = found
    known = set(map(as_label, task.label_names or ()))
    if not {as_label(name) for name in names} <= known:
        raise UserError(
            f"{place}, column {column}: the data set has the classes {listed(names, 12)}, and label_names of the task "
            f"are {listed(task.label_names or (), 12)}: take the names of the data set"
        )


def names_of_labels(place: Place, task: TaskConfig) -> tuple[str, list[str]] | None:
    """Return the label column of a table, and the names of its classes; None if it has none."""
    if not isinstance(place, Table):
        return None
    given: Any = task.data.columns.get("label")
    if given is None:
        defaults = TAGS if task.type == "tokens" else ("label",)
        given = next((column for column in defaults if column in place.header), None)
    names = place.classes.get(given) if isinstance(given, str) else None
    return None if names is None else (given, names)
