"""Checks of a run that need no torch: names, sizes, files, all rows and labels."""

from __future__ import annotations

from collections.abc import Sequence

from fastmtl.config import Recipe
from fastmtl.data.corpus import CorpusRows
from fastmtl.data.schedule import Schedule
from fastmtl.tracking.backends import check_tracking
from fastmtl.training.phases import Phase, split


def check_recipe(recipe: Recipe, world: int) -> CorpusRows:
    """Check everything of a run that needs no torch; return the rows of its files.

    world: number of processes. Raises UserError naming the file, line or key.
    """
    phases = split(recipe)
    check_tracking(recipe)
    rows = CorpusRows.read(recipe)
    check_schedules(phases, rows, world)
    return rows


def check_schedules(phases: Sequence[Phase], rows: CorpusRows, world: int) -> None:
    """Raise UserError for samplers that need more rows than the files have.

    world: number of processes. Phases with augmentation are left out: their numbers of rows are not
    known before the new rows are made.
    """
    for phase in phases:
        tasks = phase.recipe.tasks
        if not any(task.data.augment for task in tasks.values()):
            Schedule([rows.sizes[name, "train"] for name in tasks], phase.recipe, world)
