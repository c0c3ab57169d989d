"""What of a run can be checked without torch: names, sizes, files, permissions, every row and label."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fastmtl.config import Recipe
from fastmtl.data.corpus import CorpusRows
from fastmtl.data.schedule import Schedule
from fastmtl.errors import UserError
from fastmtl.phases import Phase, split


def check_recipe(recipe: Recipe, world: int) -> CorpusRows:
    """Check all that needs no torch, and return the rows that were read for it. world: number of processes.

    Raises UserError naming the file, line or key.
    """
    phases = split(recipe)
    rows = CorpusRows.read(recipe)
    check_schedules(phases, rows, world)
    return rows


def check_schedules(phases: Sequence[Phase], rows: CorpusRows, world: int) -> None:
    """Refuse samplers that the files cannot fill. Augmented files are left out: their sizes are not known yet."""
    for phase in phases:
        tasks = phase.recipe.tasks
        if not any(task.data.augment for task in tasks.values()):
            Schedule([rows.sizes[name, "train"] for name in tasks], phase.recipe, world)


def prepare_output(directory: Path, resume: bool) -> None:
    """Make the output directory. Raises UserError where it would be overwritten or cannot be written."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        used = any(directory.iterdir())
    except OSError as error:
        raise UserError(f"cannot write to the output directory {directory}: {error.strerror}") from None
    if not os.access(directory, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to the output directory {directory}: no permission")
    if used and not resume:
        raise UserError(
            f"{directory} already holds a run: go on with it by --resume, or choose another place by --output DIR"
        )
