"""Fine-tune one BERT-style encoder on many tasks at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastmtl.version import __version__

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path
    from typing import Any

    from fastmtl.config import Recipe
    from fastmtl.inference.predict import Predictor

__all__ = ["__version__", "load", "train"]


def load(model_dir: str | Path, device: str | None = None) -> Predictor:
    """Load a trained model for predictions in Python.

    model_dir: the `model/` directory of a run, or the run's directory. device: a torch device;
    default: the first GPU if there is one, else the CPU. Raises UserError for a directory without a
    model.
    """
    from fastmtl.inference.predict import load as load_predictor  # importing torch takes seconds

    return load_predictor(model_dir, device)


def train(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    output: str | Path | None = None,
    *,
    data: Mapping[str, Mapping[str, Any]] | None = None,
    overrides: Iterable[str] = (),
    resume: bool = False,
    accept_changes: bool = False,
) -> Path:
    """Train a recipe, as `fastmtl train`, and return the folder of the run.

    recipe: the name of a bundled recipe, the path of a YAML file, or its content as a dictionary.
    output: the folder of the run; default: runs/RECIPE. overrides: `section.key=value` settings.
    resume: continue from the newest checkpoint in `output`. accept_changes: resume also with other
    settings or rows.

    data: {task: {"train": rows, "dev": rows}} of rows that are in memory: a `datasets.Dataset`, a
    `pandas.DataFrame` or a list of dictionaries. They replace the files of the recipe. Several
    processes each call this function with the same rows. Raises UserError for errors that the user
    can fix.
    """
    from fastmtl.from_python import train as run

    return run(recipe, output, data, overrides, resume=resume, accept_changes=accept_changes)
