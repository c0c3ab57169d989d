"""The processes of tests/engine/test_checkpoint.py. Usage: checkpoint_cases.py DIRECTORY CASE

CASE `save`: save after two steps. `load`: two more steps from the checkpoint of another number of
ranks. `both`: save, two more steps, once directly and once from the checkpoint, then load.
"""

from __future__ import annotations

import sys
from pathlib import Path

import deepspeed_cases as steps
from safetensors.torch import save_file

from fastmtl.config import Recipe
from fastmtl.engine.build import build_engine
from fastmtl.engine.checkpoint import Checkpoints
from fastmtl.engine.distributed import Ranks, start
from fastmtl.engine.gather import gathered_state_dict

STAGES = ("zero0", "zero1", "zero2", "zero3", "zero1-flat")


def make_recipe(stage: str) -> Recipe:
    zero, _, variant = stage.removeprefix("zero").partition("-")
    recipe = steps.make_recipe(steps.Case(int(zero), 1, "pcgrad", variant=variant))
    recipe.optimizer.name = "adamw"
    recipe.optimizer.lr = 1e-3
    recipe.schedule.name = "linear"
    return recipe


class Run:
    """An engine and its surgery; `go_on` runs steps `first` to `last`."""

    def __init__(self, recipe: Recipe, ranks: Ranks, universal: bool = False) -> None:
        self.recipe, self.ranks = recipe, ranks
        model = steps.make_model(recipe)
        self.engine = build_engine(recipe, model, ranks.world, 2 * steps.STEPS, universal=universal)
        self.surgery = steps.make_surgery(self.engine, model, recipe)

    def go_on(self, first: int, last: int) -> None:
        data = steps.make_data()
        for step in range(first, last + 1):
            batch = steps.step_batches(data, step % steps.STEPS, self.ranks.rank, self.ranks.world)
            counts = dict(zip(self.recipe.task_names, batch.group_counts or (), strict=True))
            self.surgery.run([batch], lambda batch, model, task_grads: model(batch, task_grads), counts)
            self.engine.step()

    def write(self, path: Path) -> None:
        state = gathered_state_dict(self.engine)
        if state is not None:
            save_file({name: tensor.clone() for name, tensor in state.items()}, path)


def save_and_go_on(directory: Path, ranks: Ranks) -> None:
    for stage in STAGES:
        recipe = make_recipe(stage)
        run = save(directory, ranks, stage)
        run.go_on(3, 4)
        run.write(directory / f"{stage}-{ranks.world}-straight.safetensors")
        run.engine.destroy()

        checkpoints = Checkpoints(directory / f"{stage}-{ranks.world}", recipe, ranks)
        found = checkpoints.find()
        assert found is not None and not found.universal
        run = Run(recipe, ranks)
        state = checkpoints.restore(run.engine, found)
        run.surgery.load_state_dict(state["surgery"])
        run.go_on(3, 4)
        run.write(directory / f"{stage}-{ranks.world}-resumed.safetensors")
        run.engine.destroy()


def save(directory: Path, ranks: Ranks, stage: str) -> Run:
    recipe = make_recipe(stage)
    run = Run(recipe, ranks)
    run.go_on(1, 2)
    run.write(directory / f"{stage}-{ranks.world}-saved.safetensors")
    checkpoints = Checkpoints(directory / f"{stage}-{ranks.world}", recipe, ranks)
    checkpoints.save(run.engine, 2, {"surgery": run.surgery.state_dict()})
    return run


def load_of_others(directory: Path, ranks: Ranks) -> None:
    others = 3 - ranks.world
    for stage in STAGES[1:]:
        recipe = make_recipe(stage)
        checkpoints = Checkpoints(directory / f"{stage}-{others}", recipe, ranks)
        found = checkpoints.find()
        assert found is not None and found.universal
        run = Run(recipe, ranks, universal=True)
        clip = run.engine.optimizer.clip_grad
        state = checkpoints.restore(run.engine, found)
        # Adapters are a large part of this model, so DeepSpeed clips with two processes, and
        # surgery with one.
        assert run.engine.optimizer.clip_grad == clip == (0.0 if ranks.world == 1 and stage != "zero3" else 1.0)
        run.surgery.load_state_dict(state["surgery"])
        run.write(directory / f"{stage}-{others}-universal-saved.safetensors")
        run.go_on(3, 4)
        run.write(directory / f"{stage}-{others}-universal.safetensors")
        run.engine.destroy()


if __name__ == "__main__":
    target, case = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    processes = start()
    match case:
        case "save":
            for stage in STAGES[1:]:
                save(Path(target), processes, stage).engine.destroy()
        case "both":
            save_and_go_on(Path(target), processes)
            load_of_others(Path(target), processes)
        case "load":
            load_of_others(Path(target), processes)
