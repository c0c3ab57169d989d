"""What the ranks of test_choices_deepspeed.py run: every case in one launch. Usage: choices_cases.py DIRECTORY"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import choices
from safetensors.torch import save_file

from fastmtl.model.cached_pairs import cache_pairs
from fastmtl.model.multitask import MultiTaskModel
from fastmtl.surgery.gradient_surgery import GradientSurgery


@dataclass(frozen=True)
class Case:
    zero: int
    method: str
    accumulation: int

    @property
    def name(self) -> str:
        return f"zero{self.zero}-{self.method}-acc{self.accumulation}"


CASES = [
    Case(0, "sum", 2),
    Case(0, "pcgrad", 1),
    Case(1, "pcgrad", 2),
    Case(1, "gradvac", 1),
    Case(2, "gradvac", 2),
    Case(2, "sum", 1),
    Case(3, "pcgrad", 1),
]


def run_steps(target: Any, model: MultiTaskModel, method: str, parts: list[int], of: int, step_fn: Any) -> None:
    """The micro-batches `parts` of `of` in each step."""
    recipe = model.recipe
    surgery = GradientSurgery(
        target,
        method,
        tasks=recipe.task_names,
        shared=model.shared_parameters(),
        sparse=model.sparse_parameters(),
        seed=3,
    )

    def loss_fn(batch, model, task_grads):  # noqa: ANN001, ANN202
        return model(batch, task_grads)

    def plain(batch, task_grads):  # noqa: ANN001, ANN202
        return model(batch, task_grads)

    for step in range(choices.STEPS):
        batches = cache_pairs(model, [choices.make_batches(recipe, step, of)[part] for part in parts])
        info = surgery.run(batches, loss_fn if hasattr(target, "module") else plain, choices.counts(recipe))
        assert info.skipped is None
        step_fn()


def main(directory: Path) -> None:
    from fastmtl.engine.build import build_engine
    from fastmtl.engine.distributed import start
    from fastmtl.engine.gather import gathered_state_dict

    ranks = start()
    for case in CASES:
        recipe = choices.make_recipe(case.method, case.zero, case.accumulation, cached=case.accumulation > 1)
        model = choices.make_model(recipe)
        engine = build_engine(recipe, model, ranks.world, choices.STEPS)
        acc = case.accumulation
        parts = [ranks.rank * acc + a for a in range(acc)]
        run_steps(engine, model, case.method, parts, ranks.world * acc, engine.step)
        state = gathered_state_dict(engine)
        if ranks.is_main:
            assert state is not None
            save_file({name: tensor.clone() for name, tensor in state.items()}, directory / f"{case.name}.safetensors")
        engine.destroy()


if __name__ == "__main__":
    main(Path([argument for argument in sys.argv[1:] if not argument.startswith("--")][0]))
