"""Fine-tune one BERT-style encoder on many tasks at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastmtl.version import __version__

if TYPE_CHECKING:
    from pathlib import Path

    from fastmtl.inference.predict import Predictor

__all__ = ["__version__", "load"]


def load(model_dir: str | Path, device: str | None = None) -> Predictor:
    """Load a trained model for predictions in Python.

    model_dir: the `model/` directory of a run, or the run's directory. device: a torch device;
    default: the first GPU if there is one, else the CPU. Raises UserError for a directory without a
    model.
    """
    from fastmtl.inference.predict import load as load_predictor  # importing torch takes seconds

    return load_predictor(model_dir, device)
