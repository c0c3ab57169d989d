"""The runs of test_resume.py, in sequence in one process. Usage: resume_cases.py DIRECTORY BERT"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from phase_cases import make_recipe, write_data
from results_only import results_only

from fastmtl.config import Recipe
from fastmtl.errors import UserError
from fastmtl.loop import train
from fastmtl.training.prepare import check_run


def recipe_of(directory: Path, bert: Path, schedule: str = "constant", **train_section: Any) -> Recipe:
    more: dict[str, Any] = {"schedule": {"name": schedule, "warmup": 0}, "weighting": {"name": "dwa"}}
    return make_recipe(directory, bert, [], train={"epochs": 2, **train_section}, **more)


def balanced_recipe(directory: Path, bert: Path, steps: int) -> Recipe:
    weighting = {"name": "excess_mtl", "step_size": 0.5, "warmup_steps": 1}
    more: dict[str, Any] = {"schedule": {"name": "constant", "warmup": 0}, "weighting": weighting}
    return make_recipe(directory, bert, [], zero=2, train={"epochs": 1, "max_steps": steps, "ema": 0.5}, **more)


def refusal(recipe: Recipe, output: Path, begin: Callable[..., object] = train) -> str:
    try:
        begin(recipe, output, resume=True)
    except UserError as error:
        return str(error)
    return ""


def contents(directory: Path) -> dict[Path, int]:
    """Return the times of the last change of each file and folder."""
    return {path: path.stat().st_mtime_ns for path in (directory, *directory.rglob("*"))}


def main(directory: Path, bert: Path) -> None:
    write_data(directory)
    moved = directory / "moved"
    moved.mkdir()
    for file in directory.glob("*.tsv"):
        (moved / file.name).write_text(file.read_text().replace("\n", "\r\n"))  # the rows are equal
    elsewhere = recipe_of(moved, bert)
    in_parts = directory / "in parts[1]"  # brackets are a pattern to glob
    with results_only():
        train(recipe_of(directory, bert), directory / "whole")
        train(recipe_of(directory, bert, epochs=1, max_steps=4), in_parts)
        shutil.copytree(in_parts, directory / "changed")
        train(recipe_of(directory, bert, max_steps=9, log_every=2), in_parts, resume=True)  # moves epoch 1's model
        train(elsewhere, in_parts, resume=True)

        train(balanced_recipe(directory, bert, 4), directory / "balanced")
        train(balanced_recipe(directory, bert, 2), directory / "balanced-parts")
        train(balanced_recipe(directory, bert, 4), directory / "balanced-parts", resume=True)

    other = recipe_of(directory, bert, "linear")
    other.optimizer.lr, other.seed, other.sampler.batch_size = 0.5, 5, 4
    before = contents(directory / "changed")
    line = check_run(recipe_of(directory, bert), directory / "changed", resume=True)
    messages = {"check": str(line), "settings": refusal(other, directory / "changed", check_run)}
    assert contents(directory / "changed") == before
    text = (moved / "kind-train.tsv").read_text()
    (moved / "kind-train.tsv").write_text(text.replace("red", "blue"))
    messages["rows"] = refusal(elsewhere, directory / "changed")
    elsewhere.optimizer.lr, elsewhere.schedule.name = 0.5, "linear"
    train(elsewhere, directory / "changed", resume=True, accept_changes=True)
    (directory / "messages.json").write_text(json.dumps(messages))


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
