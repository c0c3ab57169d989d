"""The places of a task's rows: files, patterns of files, and tables (Hugging Face data sets)."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastmtl.errors import UserError, listed
from fastmtl.files.user_path import user_path


@dataclass(frozen=True)
class Table:
    """Rows that are not in one file: a saved data set, or an object from Python.

    name: the name in messages. header: names of the columns. batches: a function that yields all
    rows in order, in lists of cells by column name. classes: the names of the classes, by column.
    """

    name: str
    header: list[str]
    batches: Callable[[], Iterator[Sequence[Mapping[str | int, object]]]]
    classes: Mapping[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


# The rows of a split are in one place or in several.
Place = Path | Table


def find_places(names: Sequence[str], folder: str | Path) -> list[Place]:
    """Return the places that a recipe names for a split, in the order of the names.

    folder: the folder of relative names. The files of a pattern are in the order of their names.
    Raises UserError for a pattern without a file, and for a place that occurs twice.
    """
    found: list[Place] = [place for name in names for place in _places(name, user_path(folder))]
    shown = [str(place) for place in found]
    twice = next((place for index, place in enumerate(shown) if place in shown[:index]), None)
    if twice is not None:
        raise UserError(f"{twice}: named twice by {listed(names)}: name each place once")
    return found


def _places(name: str, folder: Path) -> list[Place]:
    path = folder / user_path(name)
    if path.exists() or not glob.has_magic(name):
        return [path]
    matches = sorted(glob.glob(str(path), recursive=True))
    if not matches:
        raise UserError(f"{path}: no file matches this pattern")
    return [Path(match) for match in matches]


def missing(name: str, folder: str | Path) -> bool:
    """Return whether a recipe's name of a file or pattern of files leads to nothing.

    folder: the folder of a relative name.
    """
    path = user_path(folder) / user_path(name)
    return not path.exists() and not (glob.has_magic(name) and glob.glob(str(path), recursive=True))
