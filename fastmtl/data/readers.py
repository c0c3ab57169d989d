"""Reading of a task's files into rows. Every cell is checked."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np

from fastmtl.config import DataConfig, TaskConfig
from fastmtl.data.class_names import check_class_names, opened
from fastmtl.data.dev_rows import split_rows
from fastmtl.data.find_places import find_places
from fastmtl.data.formats import check_format
from fastmtl.data.places import Place, Table
from fastmtl.data.records import BadRow
from fastmtl.data.rows import Rows
from fastmtl.data.spill import spilling_to
from fastmtl.data.types import DATA_TYPES
from fastmtl.errors import UserError

Split = Literal["train", "dev", "test"]


def read_rows(task: TaskConfig, data: DataConfig, split: Split, *, require_labels: bool = True) -> Rows:
    """Return the rows of a task's train, dev or test split; see `read_splits`."""
    splits: tuple[Split, ...] = ("train", "dev") if split == "dev" and data.dev_share(task.data) else (split,)
    return read_splits(task, data, splits, require_labels=require_labels)[split]


def read_splits(
    task: TaskConfig,
    data: DataConfig,
    splits: Sequence[Split],
    tables: Mapping[str, Table] | None = None,
    *,
    require_labels: bool = True,
) -> dict[Split, Rows]:
    """Return the rows of some splits of a task. Relative paths start at `data.dir`.

    tables: the rows of splits from Python.
    Without a dev file, `dev_fraction` of the training rows are the dev rows. Of the other training
    rows, a random share `data.fraction` is kept, the same rows in every run, and of these the first
    `limit`. Raises UserError where `find_places`, `read_places` and `split_rows` raise it.
    """
    found: dict[Split, Rows] = {}
    for split in splits:
        if split in found:
            continue
        names = task.data.names(split)
        if not names:
            raise UserError(f"the task has no {split} file: set tasks.<name>.data.{split}")
        table = (tables or {}).get(split)
        places = find_places(names, data.dir or ".", split) if table is None else [table]
        with spilling_to(data.cache_dir):
            rows = read_places(places, task, on_bad_row=data.on_bad_row, require_labels=require_labels)
        if split == "train":
            if data.dev_share(task.data):
                rows, found["dev"] = split_rows(rows, task, data)
            if data.fraction < 1 or task.data.limit is not None:
                rows = rows.take(_share(len(rows), data.fraction)[: task.data.limit])
        found[split] = rows
    return found


def read_file(
    path: Place,
    task: TaskConfig,
    *,
    on_bad_row: Literal["error", "skip"] = "error",
    require_labels: bool = True,
) -> Rows:
    """Return the rows of one file in the task's format; see `read_places`."""
    return read_places([path], task, on_bad_row=on_bad_row, require_labels=require_labels)


def read_places(
    places: Sequence[Place],
    task: TaskConfig,
    *,
    on_bad_row: Literal["error", "skip"] = "error",
    require_labels: bool = True,
) -> Rows:
    """Return the rows of one or more files in the task's format, one file after the other.

    on_bad_row: "skip" leaves bad rows out. A row without a label is one, unless `missing_labels` of
    the task's data is "leave_out". require_labels: whether every row needs a label. If False, the
    label column is not read, so it may be missing, empty or -1.

    Raises UserError naming file, line and column for a bad row (missing text, label not a number or
    out of range, wrong number of columns, not UTF-8, wrong quotes) unless on_bad_row is "skip",
    and naming the file if it has no rows or lacks a required column.
    """
    check_format(task.data.format, DATA_TYPES[task.type].formats)
    numbers = itertools.count()
    return Rows.join([_read_place(place, task, on_bad_row, numbers, require_labels=require_labels) for place in places])


def _read_place(
    place: Place,
    task: TaskConfig,
    on_bad_row: Literal["error", "skip"],
    numbers: Iterator[int],
    *,
    require_labels: bool,
) -> Rows:
    place = opened(place)
    check_class_names(place, task)
    skipped: list[BadRow] = []
    left_out = 0

    def report(bad: BadRow) -> None:
        nonlocal left_out
        if bad.missing and task.data.missing_labels == "leave_out":
            left_out += 1
        elif on_bad_row == "skip":
            skipped.append(bad)
        elif bad.missing:
            raise UserError(
                f"{place}, {bad}. Give the row a label, or set missing_labels: leave_out in the task's data to leave "
                "out rows without one."
            )
        else:
            raise UserError(f"{place}, {bad}. Fix the row, or set data.on_bad_row=skip to leave such rows out.")

    read = DATA_TYPES[task.type].read
    rows = read(place, task, report, require_labels=require_labels, numbers=numbers)
    if not len(rows):
        why = [f"{len(skipped)} bad ones were skipped"] if skipped else []
        why += [f"{left_out} without a label were left out"] if left_out else []
        raise UserError(f"{place}: no rows" + (f" ({', '.join(why)})" if why else ""))
    notes = rows.notes
    if left_out:
        have = "1 row has" if left_out == 1 else f"{left_out} rows have"
        notes = [*notes, f"{place.name}: {have} no label, left out (missing_labels: leave_out)"]
    return dataclasses.replace(rows, skipped=skipped, notes=notes)


def _share(rows: int, fraction: float) -> np.ndarray:
    """Return the numbers of randomly chosen rows, int64, ascending: round(fraction * rows) of them.

    At least one row is chosen. The choice is the same in every run. The rows of a smaller fraction
    are among those of a larger one.
    """
    drawn = np.random.default_rng(0).permutation(rows)[: max(1, round(fraction * rows))]
    return np.sort(drawn)
