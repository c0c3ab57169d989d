"""The results of a run as JSON values (`results.json`).

The report is built from them, the metrics and the recipe.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fastmtl.config import Recipe
from fastmtl.inference.scores import Scores
from fastmtl.inference.selection import evaluate_scores, mean_score
from fastmtl.inference.types import INFERENCE_TYPES
from fastmtl.measure.harness import peak_bytes
from fastmtl.version import __version__

PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "safetensors", "numpy")


def collect_results(
    recipe: Recipe,
    scored: Mapping[str, Scores],
    data: Mapping[str, Mapping[str, Mapping[str, Any]]],
    *,
    steps: int,
    seconds: float,
    world_size: int,
) -> dict[str, Any]:
    """Return the results of a run as JSON values.

    scored: {task: scores of its dev rows}.
    data: {task: {"train" | "dev": {"rows": n, "skipped": n, "truncated": n,
    "labels": the result of `label_statistics`}}}.
    steps, seconds: optimiser steps and training time of the whole run.
    """
    dev = {name: evaluate_scores(recipe.tasks[name], scores) for name, scores in scored.items()}
    summaries = {
        name: INFERENCE_TYPES[recipe.tasks[name].type].summary(recipe.tasks[name], scores)
        for name, scores in scored.items()
    }
    return {
        "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "steps": steps,
        "seconds": round(seconds, 1),
        "world_size": world_size,
        "memory_mib": _peak_mib(),
        "dev": dev,
        "mean": mean_score(dev, recipe) if dev else None,
        "confusion": {name: found.confusion for name, found in summaries.items() if found.confusion is not None},
        "names": {name: found.names for name, found in summaries.items() if found.names},
        "scatter": {name: found.scatter for name, found in summaries.items() if found.scatter is not None},
        "per_label": {name: asdict(found.per_label) for name, found in summaries.items() if found.per_label},
        "errors": {name: asdict(found.errors) for name, found in summaries.items() if found.errors},
        "data": {task: {split: dict(counts) for split, counts in splits.items()} for task, splits in data.items()},
        "versions": {"python": platform.python_version(), "fastmtl": __version__, **_versions()},
    }


def _peak_mib() -> float | None:
    """Return the peak memory of this process in MiB: of torch on its GPU, else the resident set."""
    import torch

    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else peak_bytes()
    return None if peak is None else round(peak / 2**20, 1)


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # no metadata, as in a source tree
    return found
