"""TensorBoard: files in the run's folder tensorboard/."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fastmtl.config import Recipe
from fastmtl.tracking.backends.backend import Backend


class TensorBoard(Backend):
    def __init__(self, output: Path, recipe: Recipe, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

        self._board = SummaryWriter(str(output / "tensorboard"), purge_step=resume_step + 1 if resume_step else None)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._board.close()
