"""A run that a Python program starts: `fastmtl.train`."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fastmtl.config import Recipe, parse_recipe
from fastmtl.config.load import apply_overrides, recipe_values
from fastmtl.data.objects import Objects, marked, tables
from fastmtl.engine.early_errors import errors_reach_rank_0
from fastmtl.errors import UserError
from fastmtl.files.output_folder import OutputFolder
from fastmtl.loop import train as run
from fastmtl.system.launcher_variables import is_first, world_size
from fastmtl.training.early_checks import check_recipe


def train(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    output: str | Path | None,
    data: Objects | None,
    overrides: Iterable[str],
    *,
    resume: bool,
    accept_changes: bool,
) -> Path:
    """Train a recipe and return the folder of the run; see `fastmtl.train`."""
    folder = None
    with errors_reach_rank_0():
        if accept_changes and not resume:
            raise UserError("accept_changes needs resume: a new run has no earlier settings to differ from")
        directory = _folder(recipe, output)
        values, source = _values(recipe, overrides)
        tasks = values.get("tasks")
        found = tables(data or {}, list(tasks) if isinstance(tasks, Mapping) else [])
        settings = parse_recipe(marked(values, found), source)
        if is_first():
            folder = OutputFolder(directory, resume=resume)
        try:
            settings, rows = check_recipe(settings, world_size(), found)
        except BaseException:
            _release(folder)
            raise
    try:
        run(settings, directory, resume=resume, accept_changes=accept_changes, rows=rows)
    finally:
        _release(folder)
    return directory


def _release(folder: OutputFolder | None) -> None:
    if folder is not None:
        folder.release()


def _folder(recipe: object, output: str | Path | None) -> Path:
    if output is not None:
        return Path(output)
    if isinstance(recipe, str | Path):
        return Path("runs") / Path(recipe).stem
    raise UserError("output: name the folder of the run, since the recipe has no name")


def _values(recipe: str | Path | Mapping[str, Any] | Recipe, overrides: Iterable[str]) -> tuple[dict[str, Any], str]:
    """Return a recipe as {section: settings}, and its name in messages."""
    if isinstance(recipe, str | Path):
        return recipe_values(str(recipe), overrides)
    if isinstance(recipe, Recipe):
        values = recipe.model_dump(mode="json", exclude_unset=True)
    elif isinstance(recipe, Mapping):
        values = copy.deepcopy(dict(recipe))
    else:
        raise UserError(
            f"recipe: expected a name, a path, a dictionary or a fastmtl.config.Recipe, found {type(recipe).__name__}"
        )
    apply_overrides(values, overrides)
    return values, "recipe"
