"""The process of test_gpu.py: engines with fp16 and its loss scale. Usage: gpu_cases.py FILE"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from deepspeed_cases import Case, make_data, make_model, make_recipe, make_surgery, step_batches

from fastmtl.engine.build import build_engine
from fastmtl.engine.distributed import start

STEPS = 100
# A gradient of 0.01 times 2^32 is not finite in fp16: the first steps must be skipped.
SCALE_POWER = 32


def run(case: Case) -> dict[str, Any]:
    """Run one model with the same batch in every step."""
    recipe = make_recipe(case)
    recipe.deepspeed["fp16"] = {"initial_scale_power": SCALE_POWER, "hysteresis": 1}
    model = make_model(recipe)
    engine = build_engine(recipe, model, 1, STEPS)
    surgery = make_surgery(engine, model, recipe)
    batch = step_batches(make_data(), 0, 0, 1).to(engine.device)
    losses: list[float] = []
    skipped: list[str | None] = []
    for _ in range(STEPS):
        info = surgery.run([batch], lambda batch, model, task_grads: model(batch, task_grads))
        skipped.append(info.skipped)
        losses.append(sum(info.losses.values()))
        if info.skipped is None:
            engine.step()
    found = {
        "losses": losses,
        "skipped": skipped,
        "scale": float(engine.optimizer.loss_scale),
        "overflows": int(engine.skipped_steps),
        "finite": all(bool(torch.isfinite(p).all()) for p in model.parameters()),
    }
    engine.destroy()
    return found


if __name__ == "__main__":
    start()
    cases = [
        Case(zero, 1, method, precision="fp16", storage=storage)
        for zero, (method, storage) in itertools.product(
            (1, 2, 3), (("sum", "auto"), ("pcgrad", "auto"), ("pcgrad", "replay"))
        )
    ]
    cases += [Case(1, 1, method, precision="fp16", variant="flat") for method in ("sum", "pcgrad")]
    Path(sys.argv[1]).write_text(json.dumps({case.name: run(case) for case in cases}))
