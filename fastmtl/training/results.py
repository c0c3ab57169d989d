"""The results of a run as JSON values (`results.json`).

The report is built from them, the metrics and the recipe.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastmtl.config import Recipe
from fastmtl.inference.metrics import confusion, evaluate_predictions, mean_score
from fastmtl.version import __version__

PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "safetensors", "numpy")
SCATTER_POINTS = 800  # more would overlap and only make the file larger


def collect_results(
    recipe: Recipe,
    scored: Mapping[str, tuple[np.ndarray, np.ndarray]],
    data: Mapping[str, Mapping[str, Mapping[str, Any]]],
    *,
    steps: int,
    seconds: float,
    world_size: int,
) -> dict[str, Any]:
    """Return the results of a run as JSON values.

    scored: {task: (scores, labels)} of the dev rows, with the scores of `MultiTaskModel.predict`.
    data: {task: {"train" | "dev": {"rows": n, "skipped": n, "truncated": n,
    "labels": the result of `label_statistics`}}}.
    steps, seconds: optimiser steps and training time of the whole run.
    """
    dev = {name: evaluate_predictions(recipe.tasks[name], *pair) for name, pair in scored.items()}
    regression = {name: pair for name, pair in scored.items() if recipe.tasks[name].type == "regression"}
    return {
        "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "steps": steps,
        "seconds": round(seconds, 1),
        "world_size": world_size,
        "dev": dev,
        "mean": mean_score(dev, recipe) if dev else None,
        "confusion": {
            name: confusion(recipe.tasks[name], *pair).tolist()
            for name, pair in scored.items()
            if name not in regression
        },
        "scatter": {name: _sample(*pair) for name, pair in regression.items()},
        "data": {task: {split: dict(counts) for split, counts in splits.items()} for task, splits in data.items()},
        "versions": {"python": platform.python_version(), "fastmtl": __version__, **_versions()},
    }


def _sample(scores: np.ndarray, labels: np.ndarray) -> dict[str, list[float]]:
    """Return labels and scores of at most SCATTER_POINTS rows, evenly spaced."""
    chosen = np.unique(np.linspace(0, len(scores) - 1, min(len(scores), SCATTER_POINTS)).astype(np.int64))
    return {
        "labels": [round(float(value), 4) for value in np.asarray(labels)[chosen]],
        "scores": [round(float(value), 4) for value in np.asarray(scores)[chosen]],
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # no metadata, as in a source tree
    return found
