"""The study of a search: study.db (SQLite), which Optuna's own tools can open, and its checks.

recipe.yaml beside it is the recipe without the settings of the trials.
"""

from __future__ import annotations

import sqlite3
from functools import partial
from pathlib import Path
from typing import Any

from fastmtl.config import Recipe, load_recipe
from fastmtl.errors import UserError
from fastmtl.sweep.child_process import difference
from fastmtl.sweep.space import Space

NAME = "sweep"


def open_study(directory: Path, recipe: Recipe, space: Space) -> Any:
    """Open the study of a directory, or begin one.

    Raises UserError for a file that is no study, and for a study with another recipe or space.
    """
    import optuna
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    file = directory / "study.db"
    # The file is opened here, since a name in an address of SQLAlchemy could have no question mark.
    creator = partial(sqlite3.connect, str(file), timeout=60, check_same_thread=False)
    try:
        study = optuna.create_study(
            study_name=NAME,
            storage=optuna.storages.RDBStorage("sqlite:///study.db", engine_kwargs={"creator": creator}),
            direction="maximize",
            pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=1),
            load_if_exists=True,
        )
    except (SQLAlchemyError, StorageInternalError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file} cannot be opened as a study of Optuna: {reason}") from None
    _check(directory, study, recipe, space)
    return study


def _check(directory: Path, study: Any, recipe: Recipe, space: Space) -> None:
    elsewhere = "choose another place with --output"
    trials = [trial for trial in study.get_trials(deepcopy=False) if trial.distributions]
    for trial in trials:
        if set(trial.distributions) != set(space.distributions):
            raise UserError(f"{directory} has a search of {', '.join(sorted(trial.distributions))}: {elsewhere}")
        for key, distribution in trial.distributions.items():
            if not space.fits(key, distribution):
                raise UserError(
                    f"{directory} has a search with other values of {key}: {elsewhere}, or the former values "
                    "(only low and high may change)"
                )
    file = directory / "recipe.yaml"
    if trials and file.is_file():
        changed = difference(load_recipe(str(file)), recipe)
        if changed is not None:
            raise UserError(f"{directory} has a search with {changed}: {elsewhere}, or the former settings")
    file.write_text(recipe.dump(), encoding="utf-8")
