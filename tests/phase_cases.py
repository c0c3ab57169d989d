"""The runs that test_phases.py looks at, in one process. Usage: phase_cases.py DIRECTORY TINY_BERT"""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

from fastmtl.config import Recipe, parse_recipe
from fastmtl.tracking import Tracker

TASKS = ("kind", "same", "degree")
COLORS, PLACES = ["red", "blue", "green"], ["road", "house", "river", "city"]

HEADS = {
    "name": "heads",
    "trains": "heads",
    "keep": "best_of_each",
    "adapter": {"name": "none"},
    "optimizer": {"lr": 3e-2},
    "train": {"epochs": 4},
}
TUNE = {"name": "tune", "adapter": {"name": "none"}, "gradient": {"method": "gradvac"}, "train": {"epochs": 2}}
ADAPTERS = {
    "name": "adapters",
    "trains": "adapters",
    "sampler": {"name": "round_robin"},
    "optimizer": {"adapter_lr": 1e-2},
}
MLM = {"name": "words", "objective": "mlm", "optimizer": {"lr": 1e-3}, "accumulation": 2}
ONE = {"name": "one", "tasks": ["same"], "adapter": {"name": "none"}, "early_stopping": {"metric": "same/accuracy"}}
RUNS: dict[str, list[dict[str, Any]]] = {
    "three": [HEADS, TUNE, ADAPTERS],
    "two": [HEADS, TUNE],
    "heads": [HEADS],
    "subset": [HEADS, {**ONE, "trains": "heads"}],
    "mlm": [MLM, {**TUNE, "train": {"epochs": 1}}],
    "first": [ONE, {**ADAPTERS, "trains": "adapters+heads"}],
}


def write_data(directory: Path) -> None:
    """Which color, whether places are the same, how many words agree."""
    draw = random.Random(0)

    def sentence() -> str:
        return f"the {draw.choice(COLORS)} car sat in the {draw.choice(PLACES)}"

    for split, rows in (("train", 48), ("dev", 21)):
        lines: dict[str, list[str]] = {"kind": ["a\tlabel"], "same": ["a\tb\tlabel"], "degree": ["a\tb\tlabel"]}
        for _ in range(rows):
            one, two = sentence(), sentence()
            lines["kind"].append(f"{one}\t{COLORS.index(one.split()[1])}")
            lines["same"].append(f"{one}\t{two}\t{int(one.split()[-1] == two.split()[-1])}")
            agree = sum(a == b for a, b in zip(one.split(), two.split(), strict=True))
            lines["degree"].append(f"{one}\t{two}\t{agree - 5}")
        for name, text in lines.items():
            (directory / f"{name}-{split}.tsv").write_text("\n".join(text) + "\n", encoding="utf-8")


def make_recipe(directory: Path, bert: Path, phases: list[dict[str, Any]], zero: int = 1) -> Recipe:
    def task(name: str, **more: Any) -> dict[str, Any]:
        columns = (
            {"text": "a", "label": "label"} if name == "kind" else {"text": "a", "text_pair": "b", "label": "label"}
        )
        return {"data": {"train": f"{name}-train.tsv", "dev": f"{name}-dev.tsv", "columns": columns}, **more}

    return parse_recipe(
        {
            "encoder": {"path": str(bert)},
            "adapter": {"name": "low_rank", "size": 4, "init": "no_influence"},
            "data": {"dir": str(directory), "cache_dir": str(directory / "cache")},
            "tasks": {
                "kind": task("kind", type="classification", num_labels=3, pooling="mean"),
                "same": task("same", type="binary"),
                "degree": task("degree", type="regression", range=[0, 2], pairs="bi", pooling="mean"),
            },
            "sampler": {"batch_size": 8},
            "gradient": {"method": "pcgrad"},
            "optimizer": {"lr": 3e-3},
            "engine": {"zero": zero},
            "phases": phases,
        },
        "test",
    )


def train_until(recipe: Recipe, output: Path, step: int, *, resume: bool) -> None:
    """Stops the run after a step, as `kill` does."""
    from fastmtl.train import train

    told = Tracker.step

    def stop(self: Tracker, at: int, *more: Any) -> None:
        told(self, at, *more)
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)

    Tracker.step = stop  # type: ignore[method-assign]
    try:
        train(recipe, output, resume=resume)
    finally:
        Tracker.step = told  # type: ignore[method-assign]


def break_off_between_phases(recipe: Recipe, output: Path) -> None:
    from fastmtl import train

    class Broken(train.PhaseModel):
        def take_over(self, *_: Any) -> None:
            raise RuntimeError("the power fails")

    whole, train.PhaseModel = train.PhaseModel, Broken  # type: ignore[misc]
    try:
        train.train(recipe, output)
    except RuntimeError:
        pass
    finally:
        train.PhaseModel = whole  # type: ignore[misc]


def main(directory: Path, bert: Path) -> None:
    from fastmtl.train import train

    write_data(directory)
    for name, phases in RUNS.items():
        zero = 2 if name == "first" else 1
        train(make_recipe(directory, bert, phases, zero), directory / name)
    # steps of "three": 4 x 6 of heads, 2 x 6 of tune, 6 of adapters
    recipe = make_recipe(directory, bert, RUNS["three"])
    break_off_between_phases(recipe, directory / "stopped")
    train_until(recipe, directory / "stopped", 28, resume=True)
    train_until(recipe, directory / "stopped", 38, resume=True)
    train(recipe, directory / "stopped", resume=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
