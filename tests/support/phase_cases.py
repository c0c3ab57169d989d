"""The runs of test_phases.py. Usage: phase_cases.py DIRECTORY TINY_BERT"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import option_cases
from ranks import run_ranks
from results_only import results_only

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


# Other state that a stopped run has to restore: dynamic weights, SMART's teacher and strengths.
OBJECTIVES: dict[str, Any] = {
    "weighting": {"name": "dwa"},
    "smart": {
        "strength": {"kind": 1.0, "degree": 1.0},
        "proximal": 1.0,
        "momentum": 0.5,
        "follows": "gap",
        "noise": 0.01,
        "epsilon": 0.1,
        "step_size": 0.1,
    },
    "engine": {"zero": 2, "accumulation": 2},
    "train": {"epochs": 4},
}


def write_data(directory: Path) -> None:
    """Write three tasks: which color, whether places are the same, how many words agree."""
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


def make_recipe(directory: Path, bert: Path, phases: list[dict[str, Any]], zero: int = 1, **sections: Any) -> Recipe:
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
            **sections,
        },
        "test",
    )


def train_until(recipe: Recipe, output: Path, step: int, *, resume: bool) -> None:
    """Stop the run after a step, like `kill`."""
    from fastmtl.loop import train

    original = Tracker.step

    def stop(self: Tracker, at: int, *more: Any) -> None:
        original(self, at, *more)
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)

    Tracker.step = stop  # type: ignore[method-assign, assignment]
    try:
        train(recipe, output, resume=resume)
    finally:
        Tracker.step = original  # type: ignore[method-assign]


def break_off_between_phases(recipe: Recipe, output: Path) -> None:
    from fastmtl import loop

    class Broken(loop.PhaseModel):
        def take_over(self, *_: Any) -> None:
            raise RuntimeError("the power fails")

    whole, loop.PhaseModel = loop.PhaseModel, Broken  # type: ignore[misc]
    try:
        loop.train(recipe, output)
    except RuntimeError:
        pass
    finally:
        loop.PhaseModel = whole  # type: ignore[misc]


def run_on_ranks(directory: Path, bert: Path, world: int) -> None:
    """Run the same steps on any number of ranks: no dropout, and rows distributed over them."""
    from fastmtl.loop import train

    group = {"name": "compromise", "batch_size": 8 // world, "batches_per_step": 5}
    grouped = {"name": "group", "gradient": {"method": "gradvac"}, "sampler": group, "accumulation": 2}
    words = {**MLM, "sampler": {"batch_size": 8 // world}}
    recipe = make_recipe(directory, bert, [grouped, words], zero=2)
    recipe.encoder.hidden_dropout = recipe.encoder.attention_dropout = 0.0
    for task in recipe.tasks.values():
        task.head.dropout = 0.0
    train(recipe, directory / f"ranks-{world}")


def main(directory: Path, bert: Path) -> None:
    from fastmtl.loop import train

    write_data(directory)
    with results_only():
        run_ranks(2, run_on_ranks, directory, bert, 2)
        run_on_ranks(directory, bert, 1)
    gc.freeze()  # all is imported: the collections between phases need not look at it again
    for name, phases in RUNS.items():
        zero = 2 if name == "first" else 1
        with contextlib.nullcontext() if name == "three" else results_only():  # a test reads its report
            train(make_recipe(directory, bert, phases, zero), directory / name)
    with results_only():
        train_loras(directory, bert)
        train_in_parts(directory, bert)
        option_cases.run_all(directory, bert)


def train_loras(directory: Path, bert: Path) -> None:
    """Train heads, then a LoRA of all tasks; from there one of each task, in ZeRO 3."""
    from fastmtl.inference.export import export
    from fastmtl.loop import train

    heads = {"name": "heads", "trains": "heads"}
    phases: list[dict[str, Any]] = [
        heads,
        {"name": "lora", "trains": "adapters+heads", "gradient": {"method": "pcgrad"}},
    ]
    lora = {"rank": 4, "alpha": 16.0, "targets": ["query", "value", "output"], "dropout": 0.1, "layers": [1]}
    common = {"adapter": {"name": "none"}, "optimizer": {"lr": 3e-3, "adapter_lr": 1e-2}}
    train(make_recipe(directory, bert, phases, zero=2, lora=lora, **common), directory / "lora")
    export(directory / "lora" / "model", directory / "peft", "peft")
    lora = {"path": str(directory / "peft"), "tasks": "own"}
    recipe = make_recipe(directory, bert, [], zero=3, lora=lora, train={"max_steps": 2}, **common)
    train(recipe, directory / "lora-own")


def train_in_parts(directory: Path, bert: Path) -> None:
    from fastmtl.loop import train

    # steps of "three": 4 x 6 of heads, 2 x 6 of tune, 6 of adapters
    recipe = make_recipe(directory, bert, RUNS["three"])
    break_off_between_phases(recipe, directory / "stopped")
    train_until(recipe, directory / "stopped", 28, resume=True)
    train_until(recipe, directory / "stopped", 38, resume=True)
    train(recipe, directory / "stopped", resume=True)
    recipe = make_recipe(directory, bert, [], **OBJECTIVES)  # 4 x 3 steps
    recipe.tasks["degree"].loss = ["mse", "mnr"]
    recipe.tasks["degree"].mnr.cached = True
    train(recipe, directory / "objectives")
    train_until(recipe, directory / "objectives-stopped", 8, resume=False)
    train_until(recipe, directory / "objectives-stopped", 10, resume=True)
    train(recipe, directory / "objectives-stopped", resume=True)


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
