"""The processes of tests/engine/test_checkpoint.py. Usage: checkpoint_cases.py DIRECTORY

One rank saves after two steps. Two ranks do so, take two more steps, once directly and once from
the checkpoint, and two more from the checkpoint of one rank. Then one rank takes two more steps
from the checkpoint of two ranks.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import deepspeed_cases as steps
from ranks import run_ranks
from safetensors.torch import save_file

from fastmtl.config import Recipe
from fastmtl.engine.build import build_engine
from fastmtl.engine.checkpoint import Checkpoints
from fastmtl.engine.distributed import Ranks, start
from fastmtl.engine.gather import gathered_state_dict
from fastmtl.surgery.ranks import collectives

STAGES = ("zero0", "zero1", "zero2", "zero3", "zero1-flat")
# Stages with weights that follow excess risks, whose sums of squares are divided among the ranks:
# in ZeRO 2 those of all parameters together, in many pieces; in ZeRO 3 those of each parameter.
EXCESS = {"zero2": "excess-pieces", "zero3": "excess"}


def make_recipe(stage: str) -> Recipe:
    zero, _, variant = stage.removeprefix("zero").partition("-")
    recipe = steps.make_recipe(steps.Case(int(zero), 1, "pcgrad", variant=EXCESS.get(stage, variant)))
    recipe.optimizer.name = "adamw"
    recipe.optimizer.lr = 1e-3
    recipe.schedule.name = "linear"
    return recipe


def each(stages: Sequence[str]) -> Iterator[str]:
    """Yield stages; J has many pieces until the next one in those with that variant."""
    for stage in stages:
        bucket = steps.PIECE if EXCESS.get(stage, "").endswith("pieces") else collectives.BUCKET
        with mock.patch.object(collectives, "BUCKET", bucket):
            yield stage


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
    for stage in each(STAGES):
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
        run.surgery.load_tensors(found.tensors())
        run.go_on(3, 4)
        run.write(directory / f"{stage}-{ranks.world}-resumed.safetensors")
        run.engine.destroy()


def save(directory: Path, ranks: Ranks, stage: str) -> Run:
    recipe = make_recipe(stage)
    run = Run(recipe, ranks)
    run.go_on(1, 2)
    run.write(directory / f"{stage}-{ranks.world}-saved.safetensors")
    checkpoints = Checkpoints(directory / f"{stage}-{ranks.world}", recipe, ranks)
    checkpoints.save(run.engine, 2, {"surgery": run.surgery.state_dict()}, tensors=run.surgery.tensors())
    return run


def load_of_others(directory: Path, ranks: Ranks) -> None:
    others = 3 - ranks.world
    for stage in each(STAGES[1:]):
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
        run.surgery.load_tensors(found.tensors())
        run.write(directory / f"{stage}-{others}-universal-saved.safetensors")
        run.go_on(3, 4)
        run.write(directory / f"{stage}-{others}-universal.safetensors")
        run.engine.destroy()


def save_alone(directory: Path) -> None:
    processes = start()
    for stage in each(STAGES[1:]):
        save(directory, processes, stage).engine.destroy()


def save_and_load(directory: Path) -> None:
    processes = start()
    save_and_go_on(directory, processes)
    load_of_others(directory, processes)


def load_alone(directory: Path) -> None:
    load_of_others(directory, start())


if __name__ == "__main__":
    gc.freeze()  # all is imported: DeepSpeed collects garbage for each engine in ZeRO 3
    for world, case in ((1, save_alone), (2, save_and_load), (1, load_alone)):
        run_ranks(world, case, Path(sys.argv[1]))
