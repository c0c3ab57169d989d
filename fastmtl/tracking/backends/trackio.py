"""Trackio. TRACKIO_DIR names the folder of its data base, TRACKIO_SPACE_ID a space."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from fastmtl.config import Recipe
from fastmtl.tracking.backends.backend import Backend, flat


class Trackio(Backend):
    """A run in the project of TRACKIO_PROJECT, by default fastmtl; a resume continues it."""

    def __init__(self, output: Path, recipe: Recipe, resume_step: int) -> None:
        import trackio

        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", "fastmtl"),
            name=output.resolve().name,
            config=flat(recipe.model_dump(mode="json")),
            resume="allow" if resume_step else "never",
            embed=False,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()
