"""Checks of a run that need no torch: names, sizes, files, all rows and labels."""

from __future__ import annotations

from collections.abc import Sequence

from fastmtl.config import Recipe
from fastmtl.data.corpus import CorpusRows
from fastmtl.data.schedule import Schedule
from fastmtl.training.phases import Phase, split


def check_recipe(recipe: Recipe, world: int) -> CorpusRows:
    """Check everything that needs no torch and return the rows that were read.

    world: number of processes. Raises UserError naming the file, line or key.
    """
    phases = split(recipe)
    rows = CorpusRows.read(recipe)
    check_schedules(phases, rows, world)
    return rows


def check_schedules(phases: Sequence[Phase], rows: CorpusRows, world: int) -> None:
    """Raise UserError for samplers that need more rows than the files have.

    Phases with augmentation are left out, since the sizes are not known yet.
    """
    for phase in phases:
        tasks = phase.recipe.tasks
        if not any(task.data.augment for task in tasks.values()):
            Schedule([rows.sizes[name, "train"] for name in tasks], phase.recipe, world)
