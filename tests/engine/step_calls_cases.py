"""Print the input of test_step_calls.py as JSON.

It is the calls of a step of BERT-base's 12 layers in several configurations, and whether a step
that is not finite leaves no trace.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from fastmtl.bench.sizes import Shape, Size
from fastmtl.bench.step_calls import StepCalls, count_step
from fastmtl.bench.workload import Workload
from fastmtl.config import parse_recipe
from fastmtl.engine.build import build_engine, build_surgery
from fastmtl.model.encoder.bert import PackedBert
from fastmtl.model.multitask import MultiTaskModel

WAYS: dict[str, dict[str, Any]] = {
    "pcgrad": {},
    "pcgrad, flat": {"flat": True},
    "pcgrad, flat, graphs": {"flat": True, "graphs": True},
    "sum": {},
}
SKIPS = {"zero 1": {"zero": 1}, "zero 0": {"zero": 0}, "zero 2, flat": {"zero": 2, "flat_parameters": True}}


def told(found: StepCalls) -> dict[str, Any]:
    return {"calls": found.calls.total(), "outside": found.outside_graphs, "waits": found.waits}


def weights_after(steps: str, settings: dict[str, Any]) -> tuple[dict[str, torch.Tensor], list[str | None]]:
    """Return the weights. steps: `good` ones, and `bad` ones with a NaN in a gradient."""
    shape = Shape("narrow", 32, 2, heads=2, intermediate=64, rows=4, vocabulary=100, positions=128)
    work = Workload(Size(shape, dropout=0.0))
    sections = {"gradient": {"method": "sum"}, "engine": {"precision": "fp32", "clip": 1.0, **settings}}
    recipe = parse_recipe({**work.recipe, **sections}, "benchmark")
    torch.manual_seed(0)
    model = MultiTaskModel(recipe, PackedBert(work.padded.encoder.config))
    engine = build_engine(recipe, model, 1, 1000)
    surgery = build_surgery(recipe, engine, model)
    engine.train()
    weight = next(p for name, p in model.named_parameters() if name.endswith("LayerNorm.bias"))
    skipped = []
    for kind in steps.split():

        def loss_fn(batch: Any, model: Any, task_grads: Any, kind: str = kind) -> Any:
            losses = model(batch, task_grads)
            if kind == "bad":  # of value 0
                name, (loss, rows) = next(iter(losses.items()))
                losses[name] = loss + (weight[0] * 0).abs().sqrt().float(), rows
            return losses

        info = surgery.run([work.packed_batch], loss_fn)
        skipped.append(info.skipped)
        if info.skipped is None:
            engine.step()
    found = {name: tensor.clone() for name, tensor in engine.module.state_dict().items()}
    engine.destroy()
    return found, skipped


if __name__ == "__main__":
    torch.set_num_threads(1)
    results: dict[str, Any] = {
        name: told(count_step(name.split(",")[0], zero=1, layers=12, precision="bf16", **settings))
        for name, settings in WAYS.items()
    }
    for name, settings in SKIPS.items():
        expected, _ = weights_after("good good", settings)
        found, skipped = weights_after("good bad good", settings)
        same = all(torch.equal(expected[key], found[key]) for key in expected)
        results[f"skip, {name}"] = {"same": same, "skipped": skipped}
    print(json.dumps(results))
