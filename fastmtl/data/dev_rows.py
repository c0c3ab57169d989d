"""Dev rows drawn from the training rows of a task without a dev file (`dev_fraction`)."""

from __future__ import annotations

import dataclasses

import numpy as np

from fastmtl.config import DataConfig, TaskConfig
from fastmtl.data.rows import Rows
from fastmtl.errors import UserError


def split_rows(rows: Rows, task: TaskConfig, data: DataConfig) -> tuple[Rows, Rows]:
    """Return the training rows and the dev rows, each in the order of `rows`.

    round(fraction * n) of n rows are dev rows, at least one. They are drawn by the seed, for types
    classification and binary from each class in proportion. The rows that were skipped and the
    notes about all rows go to the training rows. Raises UserError if no row is left to train on.
    """
    fraction, seed = data.dev_share(task.data), data.seed_of_dev(task.data)
    number = max(1, round(fraction * len(rows)))
    if number >= len(rows):
        raise UserError(
            f"{rows.path}: dev_fraction={fraction:g} leaves none of {len(rows)} rows to train on: lower it, or name a "
            "dev file"
        )
    strata = rows.labels if task.type in ("classification", "binary") else None
    chosen = draw(len(rows), number, seed, strata)
    rest = np.setdiff1d(np.arange(len(rows)), chosen)
    note = f"{number:,} of {len(rows):,} training rows are the dev rows (data.dev_fraction={fraction:g}, seed {seed})"
    dev = dataclasses.replace(rows.take(chosen), skipped=[], notes=[note])
    return rows.take(rest), dev


def draw(rows: int, number: int, seed: int, strata: np.ndarray | None = None) -> np.ndarray:
    """Return the numbers of `number` random rows of `rows`, int64, ascending.

    strata: [rows], the class of each row; k of n rows of a class are drawn where k / n is `number`
    / `rows`, rounded up or down.
    """
    order = np.random.default_rng(seed).permutation(rows)
    if strata is not None:
        order = order[np.argsort(strata[order], kind="stable")]
    return np.sort(order[np.arange(number) * rows // number])
