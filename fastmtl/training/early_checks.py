"""Checks of a run that need no torch: names, sizes, files, all rows and labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fastmtl.config import Recipe
from fastmtl.data.completion import with_class_names
from fastmtl.data.corpus import CorpusRows
from fastmtl.data.places import Table
from fastmtl.data.schedule import Schedule
from fastmtl.errors import UserError
from fastmtl.tracking.backends import check_tracking
from fastmtl.training.phases import Phase, split


def check_recipe(
    recipe: Recipe, world: int, tables: Mapping[tuple[str, str], Table] | None = None
) -> tuple[Recipe, CorpusRows]:
    """Check everything of a run that needs no torch.

    Returns the recipe with the names of classes that the rows bring along, and the rows of its
    files. world: number of processes. tables: rows from Python, by task and split. Raises UserError
    naming the file, line or key.
    """
    if recipe.data.dev_fraction and all(task.data.dev is not None for task in recipe.tasks.values()):
        raise UserError(f"data.dev_fraction: {recipe.data.dev_fraction:g}: all tasks have dev files: leave it out")
    recipe = with_class_names(recipe, tables)
    phases = split(recipe)
    check_tracking(recipe)
    rows = CorpusRows.read(recipe, tables)
    check_schedules(phases, rows, world)
    return recipe, rows


def check_schedules(phases: Sequence[Phase], rows: CorpusRows, world: int) -> None:
    """Raise UserError for samplers that need more rows than the files have.

    world: number of processes. Phases with augmentation are left out: their numbers of rows are not
    known before the new rows are made.
    """
    for phase in phases:
        tasks = phase.recipe.tasks
        if not any(task.data.augment for task in tasks.values()):
            Schedule([rows.sizes[name, "train"] for name in tasks], phase.recipe, world)
