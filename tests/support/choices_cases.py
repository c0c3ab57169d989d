"""Steps with every pooling, head and loss, for test_deepspeed.py's launch and its reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import choices

from fastmtl.engine.gradient_norm import max_norm
from fastmtl.model.losses.cached_pairs import cache_pairs
from fastmtl.model.multitask import MultiTaskModel
from fastmtl.surgery.gradient_surgery import GradientSurgery
from fastmtl.surgery.ranks.collectives import world_size


@dataclass(frozen=True)
class Case:
    zero: int
    method: str
    accumulation: int

    @property
    def name(self) -> str:
        return f"choices-zero{self.zero}-{self.method}-acc{self.accumulation}"


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
    """Run the micro-batches `parts` of `of` in each step."""
    recipe = model.recipe
    surgery = GradientSurgery(
        target,
        method,
        tasks=recipe.task_names,
        shared=model.shared_parameters(),
        sparse=model.sparse_parameters(),
        seed=3,
        max_norm=max_norm(recipe, model, world_size()) if hasattr(target, "module") else None,
    )

    def loss_fn(batch: Any, model: Any, task_grads: Any) -> Any:
        return model(batch, task_grads)

    def plain(batch: Any, task_grads: Any) -> Any:
        return model(batch, task_grads)

    for step in range(choices.STEPS):
        batches = cache_pairs(model, [choices.make_batches(recipe, step, of)[part] for part in parts])
        info = surgery.run(batches, loss_fn if hasattr(target, "module") else plain, choices.counts(recipe))
        assert info.skipped is None
        step_fn()
        if model.smart is not None:
            model.smart.follow_model(model)


def run_all(ranks: Any, keep: Callable[[Any, str], None]) -> None:
    """Run every case on this rank; keep(engine, name) saves the weights and ends the engine."""
    from fastmtl.engine.build import build_engine

    for case in CASES:
        recipe = choices.make_recipe(case.method, case.zero, case.accumulation, cached=case.accumulation > 1)
        model = choices.make_model(recipe)
        engine = build_engine(recipe, model, ranks.world, choices.STEPS)
        acc = case.accumulation
        parts = [ranks.rank * acc + a for a in range(acc)]
        run_steps(engine, model, case.method, parts, ranks.world * acc, engine.step)
        keep(engine, case.name)
