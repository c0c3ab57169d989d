"""Weights & Biases. WANDB_PROJECT, WANDB_MODE=offline and its other variables hold."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from fastmtl.config import Recipe
from fastmtl.tracking.backends.backend import Backend, keep_id, known_id


class Wandb(Backend):
    """A run in the project of WANDB_PROJECT, by default fastmtl; a resume continues it."""

    def __init__(self, output: Path, recipe: Recipe, resume_step: int) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "fastmtl"),
            name=os.environ.get("WANDB_NAME", output.resolve().name),
            dir=str(output),
            config=recipe.model_dump(mode="json"),
            id=known_id(output, "wandb") if resume_step else None,
            resume="allow",
        )
        keep_id(output, "wandb", self._run.id)
        # The x axis is the optimiser step: after a crash a resumed run repeats steps, which wandb's
        # own counter would refuse.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def close(self) -> None:
        self._run.finish()
