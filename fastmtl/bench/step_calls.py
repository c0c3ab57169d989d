"""Counts of the operators, host time and host waits of a DeepSpeed step, for a narrow model."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastmtl.bench.calls import around, operators
from fastmtl.bench.sizes import Shape, Size
from fastmtl.bench.waits import host_waits
from fastmtl.bench.workload import Workload
from fastmtl.config import parse_recipe
from fastmtl.cuda_graphs.install import install_cuda_graphs
from fastmtl.cuda_graphs.merging import record_merging
from fastmtl.cuda_graphs.recorder import Unrecorded
from fastmtl.engine.build import build_engine, build_surgery
from fastmtl.engine.distributed import start
from fastmtl.measure import ranges
from fastmtl.model.encoder.bert import PackedBert
from fastmtl.model.multitask import MultiTaskModel

IN_GRAPHS = "in graphs"
THE_REST = "the rest"
_STEPS = 10


@dataclass(frozen=True)
class StepCalls:
    """Counts of one step.

    calls: operator calls by part of the step; the part `in graphs` has those that CUDA graphs would
    replay. seconds: processor time by part. waits: one line for each time the host would wait for a
    GPU. parameters: the number of parameter tensors that DeepSpeed manages.
    """

    calls: Counter[str]
    seconds: dict[str, float]
    waits: list[str]
    parameters: int

    @property
    def outside_graphs(self) -> int:
        return self.calls.total() - self.calls[IN_GRAPHS]


class _InGraphs(Unrecorded):
    """A recorder that captures nothing: it runs each function as the step's part `in graphs`."""

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            with ranges.profile_range(IN_GRAPHS):  # type: ignore[arg-type]
                function()

        return run


def count_step(
    method: str,
    *,
    zero: int,
    layers: int,
    precision: str,
    flat: bool = False,
    graphs: bool = False,
    deepspeed: dict[str, Any] | None = None,
) -> StepCalls:
    """Count the operators, the time and the host waits of a step of one process on the CPU.

    The step has three tasks, dropout, and heads of every kind. The model is narrow: the number of
    calls does not depend on widths, and the milliseconds approximate the host's launch time.
    graphs: everything that `engine.cuda_graphs` captures is counted as a separate part. deepspeed:
    the section `deepspeed` of the recipe.
    """
    start()
    shape = Shape("narrow", 32, layers, heads=2, intermediate=64, rows=4, vocabulary=100, positions=128)
    work = Workload(Size(shape, dropout=0.1))
    engine_settings = {"zero": zero, "precision": precision, "flat_parameters": flat}
    settings = {"gradient": {"method": method}, "engine": engine_settings, "deepspeed": deepspeed or {}}
    recipe = parse_recipe({**work.recipe, **settings}, "benchmark")
    model = MultiTaskModel(recipe, PackedBert(work.padded.encoder.config))
    if graphs:
        install_cuda_graphs(model, _InGraphs())
    engine = build_engine(recipe, model, 1, 1000)
    surgery = build_surgery(recipe, engine, model)
    if graphs:
        surgery.record_with(partial(record_merging, recorder=_InGraphs()))
    engine.train()
    counts = dict(zip(recipe.task_names, work.packed_batch.counts, strict=True))

    def step() -> None:
        surgery.run([work.packed_batch], lambda batch, model, task_grads: model(batch, task_grads), counts)
        with ranges.profile_range("optimiser"):
            engine.step()

    for _ in range(2):
        step()
    calls: Counter[str] = Counter()
    for event in operators(step):
        inside = (name.removeprefix(ranges.PREFIX) for name in around(event) if name.startswith(ranges.PREFIX))
        calls[next(inside, THE_REST)] += 1
    found = StepCalls(calls, _seconds(step), host_waits(step), len(list(engine.module.parameters())))
    engine.destroy()
    return found


def _seconds(step: Callable[[], None]) -> dict[str, float]:
    """Return the mean processor seconds of each part of a step, without the parts nested in it."""
    spent: defaultdict[str, float] = defaultdict(float)
    open_parts, last = [THE_REST], time.process_time()

    def on_range(name: str, begins: bool) -> None:
        nonlocal last
        now = time.process_time()
        spent[open_parts[-1]] += (now - last) / _STEPS
        last = now
        if begins:
            open_parts.append(name)
        else:
            open_parts.pop()

    with ranges.listening(on_range):
        for _ in range(_STEPS):
            step()
    return spent
