"""Operators and host time of each part of a PCGrad step under DeepSpeed, one process, on the CPU.

    python benchmarks/engine_calls.py [--zero 1] [--layers 6] [--precision bf16] [--no-overflow-check] [--flat]
        [--graphs]

The model is so narrow that a step is all launching, which does not depend on widths: what is counted here holds for any
width, and the milliseconds (of the processor, on one thread) are about what a host needs to launch the part. With
`--graphs` everything runs as what `engine.cuda_graphs` captures, and what would be in a graph is a part of its own.
"""

from __future__ import annotations

import argparse
import os
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
from fastmtl.model.head_graphs import HeadGraphs
from fastmtl.model.multitask import MultiTaskModel
from fastmtl.recorders import Unrecorded

STEPS = 10


class InGraphs(Unrecorded):
    """Counts what CUDA graphs would hold."""

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            with ranges.named("in graphs"):  # type: ignore[arg-type]
                function()

        return run


def main(zero: int, layers: int, precision: str, overflow_check: bool, flat: bool, graphs: bool) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    shape = Shape("narrow", 32, layers, heads=2, intermediate=64, rows=4, vocabulary=100, positions=128)
    work = Workload(Size(shape, dropout=0.1))
    settings = {
        **work.recipe,
        "gradient": {"method": "pcgrad"},
        "engine": {"zero": zero, "precision": precision, "flat_parameters": flat},
    }
    if not overflow_check:
        settings["deepspeed"] = {"bf16": {"check_grad_overflow": False}}
    recipe = parse_recipe(settings, "benchmark")
    model = MultiTaskModel(recipe, PackedBert(work.padded.encoder.config))
    if graphs:
        model.encoder.use_cuda_graphs(InGraphs())
        model.graphs = HeadGraphs(model, InGraphs())
    engine = build_engine(recipe, model, 1, 1000)
    surgery = build_surgery(recipe, engine, model)
    if graphs:
        surgery.record_with(InGraphs())
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
    print(f"ZeRO {zero}, {layers} layers, {len(list(engine.module.parameters()))} parameters: {calls.total():,} calls")
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zero", type=int, choices=(0, 1, 2), default=1)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--flat", action="store_true", help="engine.flat_parameters")
    parser.add_argument("--graphs", action="store_true", help="engine.cuda_graphs")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--no-overflow-check", action="store_true", help="DeepSpeed's bf16.check_grad_overflow: false")
    chosen = parser.parse_args()
    overflow_check = not chosen.no_overflow_check
    main(chosen.zero, chosen.layers, chosen.precision, overflow_check, chosen.flat, chosen.graphs)
