"""Benchmark of whole DeepSpeed steps, with and without flat parameters and CUDA graphs.

All steps run in this process. A step is the same as in training: forward, backward, surgery, and
the step of DeepSpeed's ZeRO 1, which reduces and clips the gradients and runs AdamW. The host waits
for the device inside a step, and this time counts. So the host's clock measures several steps in a
row, with one synchronisation at the end.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastmtl.bench.recordings import STEPS_TO_RECORD, refuse_unrecorded
from fastmtl.bench.sizes import SEED, Size
from fastmtl.bench.workload import Workload
from fastmtl.config import Recipe, parse_recipe
from fastmtl.engine.build import build_engine, build_surgery
from fastmtl.engine.distributed import start
from fastmtl.errors import UserError, unknown_name
from fastmtl.measure.environment import environment
from fastmtl.measure.harness import MIB, Keep, Say, Skipped, graph_pool_bytes, summary
from fastmtl.model.encoder.bert import PackedBert
from fastmtl.model.multitask import MultiTaskModel

ZERO = 1
# Settings that make DeepSpeed check every gradient, and use a second stream. fastmtl turns them off
# if surgery already knows the norm.
CHECKS = {"zero_optimization": {"overlap_comm": True, "compute_grad_norm": True}}
BF16_CHECK = {"bf16": {"check_grad_overflow": True}}
_TOTAL_STEPS = 1000  # length of the learning rate schedule; no run here reaches its end


@dataclasses.dataclass(frozen=True)
class EngineWay:
    """One configuration of the engine.

    method: gradient.method of a recipe. flat, graphs: engine.flat_parameters and
    engine.cuda_graphs. bf16: J, the matrix of task gradients, is bfloat16. checks: DeepSpeed
    computes its own norm, checks for overflow and overlaps communication.
    """

    method: str
    flat: bool = False
    graphs: bool = False
    bf16: bool = False
    checks: bool = False

    @property
    def name(self) -> str:
        words = {"flat": self.flat, "graphs": self.graphs, "J in bf16": self.bf16, "DeepSpeed's checks": self.checks}
        return ", ".join([self.method, *(word for word, chosen in words.items() if chosen)])


WAYS = {
    way.name: way
    for way in (
        EngineWay("sum"),
        EngineWay("pcgrad"),
        EngineWay("sum", flat=True),
        EngineWay("pcgrad", flat=True),
        EngineWay("sum", flat=True, graphs=True),
        EngineWay("pcgrad", flat=True, graphs=True),
        EngineWay("pcgrad", flat=True, graphs=True, bf16=True),
        EngineWay("pcgrad", checks=True),
        EngineWay("pcgrad", flat=True, graphs=True, checks=True),
    )
}


def check_ways(names: Sequence[str]) -> list[str]:
    """Return the given names, or all of WAYS if none is given. Raise UserError for unknown ones."""
    for name in names:
        if name not in WAYS:
            raise unknown_name("way", name, WAYS)
    return list(names or WAYS)


def bench_engine(
    size: Size,
    rounds: int,
    say: Say,
    ways: Sequence[str] = tuple(WAYS),
    steps: int = 10,
    commit: str | None = None,
    keep: Keep | None = None,
) -> dict[str, Any]:
    """Time one configuration of WAYS after another, and return the result, JSON-ready.

    steps: a sample is the mean time of this many steps. rounds: samples per configuration. keep:
    called with the result so far after every configuration. peak_mib in the result: GPU memory with
    the engine and the CUDA graphs; None on a CPU. A configuration is skipped, with its reason in
    the result, if it cannot run, or if CUDA graphs were asked for and a part runs without them.
    Raises UserError if size.device is not the device that DeepSpeed uses, which is a GPU if there
    is one.
    """
    if (size.device == "cuda") != torch.cuda.is_available():
        raise UserError(f"--device {size.device}: DeepSpeed uses a GPU if there is one, and no other device")
    start()
    workload = Workload(size)
    device = workload.device
    found: dict[str, dict[str, Any]] = {}
    skipped: dict[str, str] = {}
    result = {
        "benchmark": "engine",
        "environment": environment(device, commit),
        "shape": dataclasses.asdict(size.shape),
        "precision": size.precision,
        "tasks": workload.tasks,
        "dropout": size.dropout,
        "zero": ZERO,
        "rounds": rounds,
        "steps_per_round": steps,
        "tokens": workload.packed_batch.num_tokens,
        "padded_tokens": workload.num_padded,
        "ways": found,
        "skipped": skipped,
    }
    for name in ways:
        say(name)
        try:
            found[name] = _measured(WAYS[name], workload, size.precision, rounds, steps)
        except (Skipped, UserError) as reason:
            skipped[name] = str(reason)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if keep is not None:
            keep(result)
    return result


def _measured(way: EngineWay, workload: Workload, precision: str, rounds: int, steps: int) -> dict[str, Any]:
    if way.graphs and workload.device.type != "cuda":
        raise Skipped(f"CUDA graphs need an NVIDIA GPU, the model is on {workload.device.type}")
    recipe = recipe_of(way, workload, precision)
    torch.manual_seed(SEED)
    model = MultiTaskModel(recipe, PackedBert(workload.padded.encoder.config))
    engine = build_engine(recipe, model, 1, _TOTAL_STEPS)
    try:
        return _timed(way, workload, recipe, model, engine, rounds, steps)
    finally:
        engine.destroy()


def _timed(
    way: EngineWay,
    workload: Workload,
    recipe: Recipe,
    model: MultiTaskModel,
    engine: Any,
    rounds: int,
    steps: int,
) -> dict[str, Any]:
    batch, cuda = workload.packed_batch, workload.device.type == "cuda"
    surgery = build_surgery(recipe, engine, model)
    counts = dict(zip(recipe.task_names, batch.counts, strict=True))
    wait: Callable[[], None] = torch.cuda.synchronize if cuda else lambda: None
    engine.train()

    def step() -> None:
        surgery.run([batch], lambda batch, model, task_grads: model(batch, task_grads), counts)
        engine.step()

    for _ in range(STEPS_TO_RECORD + 1):  # the last step replays the recorded graphs
        step()
    if way.graphs:
        refuse_unrecorded(model, surgery)
    wait()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    samples = []
    for _ in range(rounds):
        begun = time.perf_counter()
        for _ in range(steps):
            step()
        wait()
        samples.append((time.perf_counter() - begun) / steps)
    entry = summary(samples)
    entry["tokens_per_s"] = batch.num_tokens / entry["median_s"]
    entry["peak_mib"] = None
    if cuda:
        entry["peak_mib"] = (torch.cuda.max_memory_allocated() + graph_pool_bytes(workload.device)) / MIB
    return entry


def recipe_of(way: EngineWay, workload: Workload, precision: str) -> Recipe:
    """Return the workload's recipe, with the settings of the configuration `way`."""
    checks = {**CHECKS, **(BF16_CHECK if precision == "bf16" else {})} if way.checks else {}
    sections = {
        "gradient": {"method": way.method, "dtype": "bfloat16" if way.bf16 else "float32"},
        "engine": {
            "zero": ZERO,
            "precision": precision,
            "flat_parameters": way.flat,
            "cuda_graphs": way.graphs,
        },
        "deepspeed": copy.deepcopy(checks),  # DeepSpeed writes into its settings
    }
    return parse_recipe({**workload.recipe, **sections}, "benchmark")
