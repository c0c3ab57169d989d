"""The places that a recipe or a command names: files, patterns of files, and saved data sets."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from fastmtl.config import FROM_PYTHON
from fastmtl.data.huggingface import is_saved, open_saved
from fastmtl.data.places import Place
from fastmtl.errors import UserError, listed
from fastmtl.files.user_path import user_path


def find_places(names: Sequence[str], folder: str | Path, split: str | None = None) -> list[Place]:
    """Return the places that a recipe names for a split, in the order of the names.

    A name is a file, a pattern of files, or a folder of `save_to_disk`, with `:SPLIT` or without.
    folder: the folder of relative names. split: train, dev or test, the split of a folder whose
    name gives none. The files of a pattern are in the order of their names. Raises UserError for a
    pattern without a file, a folder of something else, and a place that occurs twice.
    """
    found: list[Place] = [place for name in names for place in _places(name, user_path(folder), split)]
    shown = [str(place) for place in found]
    twice = next((place for index, place in enumerate(shown) if place in shown[:index]), None)
    if twice is not None:
        raise UserError(f"{twice}: named twice by {listed(names)}: name each place once")
    return found


def missing(name: str, folder: str | Path) -> bool:
    """Return whether a name of a place leads to nothing. folder: that of a relative name."""
    path, whole = user_path(folder) / user_path(name), _whole(name, user_path(folder))
    return not path.exists() and whole is None and not (glob.has_magic(name) and _matches(path))


def _places(name: str, folder: Path, split: str | None) -> list[Place]:
    if name == FROM_PYTHON:
        raise UserError(
            f"the {split} rows were objects of a Python program: call fastmtl.train(recipe, data=...) there, or name a "
            f"file as data.{split} of the task"
        )
    path, whole = folder / user_path(name), _whole(name, folder)
    if whole is not None:
        return [_opened(*whole, split)]
    if path.exists() or not glob.has_magic(name):
        return [_opened(path, None, split)]
    matches = _matches(path)
    if not matches:
        raise UserError(f"{path}: no file matches this pattern")
    return [_opened(match, None, split) for match in matches]


def _whole(name: str, folder: Path) -> tuple[Path, str] | None:
    """Return the folder and the split of a name `FOLDER:SPLIT`, or None for another name."""
    before, colon, split = name.rpartition(":")
    if not colon or (folder / user_path(name)).exists() or not (folder / user_path(before)).is_dir():
        return None
    return folder / user_path(before), split


def _matches(pattern: Path) -> list[Path]:
    return [Path(match) for match in sorted(glob.glob(str(pattern), recursive=True))]


def _opened(path: Path, own: str | None, split: str | None) -> Place:
    """Return a file, or the table of a folder. own: the split that its name gives, or None."""
    if not path.is_dir():
        return path
    if not is_saved(path):
        raise UserError(
            f"{path}: a folder, not a file: name its files by a pattern such as {path.name}/*.parquet, or a folder "
            "that save_to_disk of Hugging Face's datasets has written"
        )
    default = () if split is None else (split, "validation") if split == "dev" else (split,)
    return open_saved(path, own, default)
