"""Operators and host time of each part of a PCGrad step under DeepSpeed, one process, on the CPU.

    python benchmarks/engine_calls.py [ZERO [LAYERS]]

The model is so narrow that a step is all launching, which does not depend on widths: what is counted here holds for any
width, and the milliseconds (of the processor, on one thread) are about what a host needs to launch the part.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable

import torch

from fastmtl import ranges
from fastmtl.bench.calls import around, operators
from fastmtl.bench.sizes import Shape, Size
from fastmtl.bench.workload import Workload
from fastmtl.config import parse_recipe
from fastmtl.engine.build import build_engine, build_surgery
from fastmtl.model.encoder import PackedBert
from fastmtl.model.multitask import MultiTaskModel

STEPS = 10


def main(zero: int = 1, layers: int = 6) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    shape = Shape("narrow", 32, layers, heads=2, intermediate=64, rows=4, vocabulary=100, positions=128)
    work = Workload(Size(shape, dropout=0.1))
    recipe = parse_recipe({**work.recipe, "gradient": {"method": "pcgrad"}, "engine": {"zero": zero}}, "benchmark")
    model = MultiTaskModel(recipe, PackedBert(work.padded.encoder.config))
    engine = build_engine(recipe, model, 1, 1000)
    surgery = build_surgery(recipe, engine, model)
    engine.train()

    def step() -> None:
        surgery.run([work.packed_batch], lambda batch, model, task_grads: model(batch, task_grads))
        with ranges.named("optimiser"):
            engine.step()

    for _ in range(2):
        step()
    calls: Counter[str] = Counter()
    for event in operators(step):
        inside = (name.removeprefix(ranges.PREFIX) for name in around(event) if name.startswith(ranges.PREFIX))
        calls[next(inside, "the rest")] += 1
    spent = _seconds(step)
    print(f"ZeRO {zero}, {layers} layers, {len(list(model.parameters()))} parameters: {calls.total():,} calls")
    for part, number in calls.items():
        print(f"{part:15} {number:6,} calls {1e3 * spent[part] / STEPS:8.2f} ms")


def _seconds(step: Callable[[], None]) -> Counter[str]:
    """Of each part in STEPS steps, without the parts inside it."""
    spent: Counter[str] = Counter()
    open_parts, last = ["the rest"], time.process_time()

    def tell(name: str, begins: bool) -> None:
        nonlocal last
        now = time.process_time()
        spent[open_parts[-1]] += now - last
        last = now
        if begins:
            open_parts.append(name)
        else:
            open_parts.pop()

    with ranges.listening(tell):
        for _ in range(STEPS):
            step()
    return spent


if __name__ == "__main__":
    main(*[int(argument) for argument in sys.argv[1:]])
