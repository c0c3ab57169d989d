"""Runs of all task types with phases, terms of the losses, LoRAs and samplers."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

from eight_tasks import eight_tasks, write_eight_tasks

from fastmtl.config import Recipe

HEADS = {"name": "heads", "trains": "heads", "keep": "best_of_each", "gradient": {"method": "sum"}}
RUNS: dict[str, dict[str, Any]] = {
    "phases": {
        "smart": {"strength": 0.5, "proximal": 0.5, "follows": "gap"},
        "weighting": {"name": "uncertainty"},
        "phases": [{"name": "mlm", "objective": "mlm"}, {"name": "words", "tasks": ["tags"]}, {"name": "all"}, HEADS],
    },
    "low rank": {
        "adapter": {"name": "low_rank", "size": 4},
        "lora": {"rank": 2, "tasks": "own"},
        "encoder": {"recompute": "cheap"},
        "sampler": {"batch_tokens": 300, "name": "annealed"},
        "weighting": {"name": "dwa"},
        "gradient": {"method": "gradvac", "storage": "replay"},
        "early_stopping": {"metric": "find/mrr", "patience": 1},
    },
    "transformers": {
        "encoder": {"implementation": "transformers"},
        "sampler": {"batch_size": 2, "name": "compromise", "batches_per_step": 9},
        "engine": {"zero": 3, "accumulation": 2},
    },
}


def run_all(directory: Path, bert: Path) -> None:
    """Train each of RUNS into directory/NAME."""
    from fastmtl.loop import train

    data = directory / "eight"
    data.mkdir()
    write_eight_tasks(data, {"train": 8, "dev": 5})
    for name, given in RUNS.items():
        sections = {"optimizer": {"lr": 1e-3, "head_lr": 1e-2}, "gradient": {"method": "pcgrad"}, **given}
        tasks = eight_tasks()
        if name == "low rank":
            tasks["degree"] |= {"loss": ["mse", "mnr"], "mnr": {"cached": True}}
        values = {
            "tasks": tasks,
            "data": {"dir": str(data), "cache_dir": str(data / "cache")},
            "sampler": {"batch_size": 2},
            "train": {"epochs": 1, "max_steps": 2},
            **sections,
            "encoder": {"path": str(bert), "max_length": 64, **sections.get("encoder", {})},
        }
        with mock.patch("os.fsync"):
            train(Recipe.model_validate(values), directory / name)
