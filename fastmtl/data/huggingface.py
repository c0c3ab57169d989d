"""Data sets of the package `datasets`: objects, and folders that `save_to_disk` has written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastmtl.data.columnar import BATCH, class_names, named
from fastmtl.data.places import Batch, Table
from fastmtl.errors import UserError, listed, unknown_name

INSTALL = 'pip install "fastmtl-torch[data]"'
_SPLITS, _ONE = "dataset_dict.json", "state.json"


def is_saved(folder: Path) -> bool:
    """Return whether `save_to_disk` of a Dataset or a DatasetDict has written a folder."""
    return (folder / _SPLITS).is_file() or (folder / _ONE).is_file()


def open_saved(folder: Path, split: str | None, default: tuple[str, ...]) -> Table:
    """Open a folder that `save_to_disk` has written; its files are mapped into memory.

    split: the name of a split of a DatasetDict. default: the names to try if it is None; a single
    split needs no name. Raises UserError for a split that does not exist, for a damaged folder, and
    if the package `datasets` is not installed.
    """
    if (folder / _SPLITS).is_file():
        splits = _splits(folder)
        found = [name for name in ((split,) if split is not None else default) if name in splits]
        if not found and split is None and len(splits) == 1:
            found = splits
        if not found and split is not None:
            raise UserError(f"{folder}: {unknown_name('split', split, splits)}")
        if not found:
            raise UserError(
                f"{folder}: the data set has the splits {listed(splits)}: name one as {folder.name}:{splits[0]}"
            )
        return _open(folder / found[0], f"{folder}:{found[0]}")
    if split is not None:
        raise UserError(f"{folder}: the data set has no splits, so it has none named '{split}': name the folder alone")
    return _open(folder, str(folder))


def _splits(folder: Path) -> list[str]:
    try:
        return [str(name) for name in json.loads((folder / _SPLITS).read_text(encoding="utf-8"))["splits"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / _SPLITS}: damaged: {error}") from None


def _open(folder: Path, name: str) -> Table:
    try:
        from datasets import load_from_disk
    except ImportError:
        raise UserError(f"{name}: a data set of Hugging Face needs the package datasets: {INSTALL}") from None
    import pyarrow

    try:
        return as_table(load_from_disk(str(folder)), name)
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name}: datasets cannot read this folder: {error}") from None


def as_table(dataset: Any, name: str) -> Table:
    """Return a `datasets.Dataset` as a table. name: its name in messages.

    The cells are those of the stored rows, whatever the data set's format or transform. Raises
    UserError for a data set without rows.
    """
    if not len(dataset) or not dataset.column_names:
        raise UserError(f"{name}: no rows")
    classes = class_names(dataset.features.arrow_schema)

    def batches() -> Iterator[Batch]:
        for batch in dataset.with_format("arrow").iter(BATCH):
            yield named(batch.to_pylist(), classes)

    return Table(name, list(dataset.column_names), batches, classes)
