"""Trackers of other libraries by name (the key `tracking` of a recipe), a file each."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from pathlib import Path

from fastmtl.config import Recipe
from fastmtl.errors import UserError
from fastmtl.tracking.backends.backend import Backend

# {name: (module, class, the installed package, what pip installs)}
BACKENDS = {
    "tensorboard": ("tensorboard", "TensorBoard", "tensorboard", "tensorboard"),
    "wandb": ("wandb", "Wandb", "wandb", "wandb"),
    "mlflow": ("mlflow", "MLflow", "mlflow", "mlflow-skinny"),
    "trackio": ("trackio", "Trackio", "trackio", "trackio"),
}


def check_tracking(recipe: Recipe) -> None:
    """Raise UserError for a tracker that is named twice or whose library is not installed."""
    if len(set(recipe.tracking)) < len(recipe.tracking):
        raise UserError(f"tracking: {', '.join(recipe.tracking)}: name each library once")
    for name in recipe.tracking:
        _, _, package, distribution = BACKENDS[name]
        if find_spec(package) is None:
            raise UserError(f"tracking: {name} needs its library: pip install {distribution}")


def open_backend(name: str, output: Path, recipe: Recipe, resume_step: int) -> Backend:
    """Return the tracker of this name, ready for the run in `output`.

    Raises UserError if the library cannot begin a run, with its reason.
    """
    module, kind, _, _ = BACKENDS[name]
    try:
        return getattr(importlib.import_module(f"{__name__}.{module}"), kind)(output, recipe, resume_step)
    except Exception as error:  # the libraries raise exceptions of many kinds
        raise UserError(f"tracking: {name} did not start: {error}") from error


__all__ = ["BACKENDS", "Backend", "check_tracking", "open_backend"]
