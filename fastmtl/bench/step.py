"""Benchmark of a whole training step with dropout: forward, backward and AdamW.

fastmtl's step is compared with that of transformers' model on padded batches, and with the step's
matrix products alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from fastmtl.bench.activations import kept_bytes
from fastmtl.bench.calls import operator_calls
from fastmtl.bench.sizes import SEED, Size
from fastmtl.bench.step_ways import (
    DEFAULT,
    PRODUCTS,
    SWEPT_ADAPTERS,
    SWEPT_GRAPHS,
    SWEPT_METHODS,
    SWEPT_RECOMPUTE,
    TRANSFORMERS,
    WAYS,
    Step,
)
from fastmtl.bench.textbook import PaddedModel
from fastmtl.bench.workload import Workload
from fastmtl.measure.environment import environment
from fastmtl.measure.harness import Keep, Say, Skipped, WrongResult, interleave, summary
from fastmtl.model.multitask import MultiTaskModel

# Largest relative error of a loss. float32: numbers are added in another order. bfloat16: every
# activation of a few layers has 8 bits.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DROPOUT = 0.1
# Values of the sweeps over sizes.
TOKENS = (1024, 2048, 4096, 8192)
TASKS = (2, 4, 8)
PRECISIONS = ("fp32", "bf16")
SWEEPS = ("tokens", "tasks", "adapters", "methods", "precisions", "recompute", "graphs")
# Sweeps whose steps take turns in one run, with the names of these steps.
BY_TURNS = {
    "adapters": SWEPT_ADAPTERS,
    "methods": SWEPT_METHODS,
    "recompute": SWEPT_RECOMPUTE,
    "graphs": SWEPT_GRAPHS,
}


class LossMismatch(WrongResult):
    """Raised if a model's losses differ from those of transformers' model."""


def bench_step(
    size: Size,
    rounds: int,
    say: Say,
    commit: str | None = None,
    ways: Sequence[str] = DEFAULT,
    keep: Keep | None = None,
) -> dict[str, Any]:
    """Time implementations of a step in turn, in this process, and return the result, JSON-ready.

    size: its dropout is ignored. ways: names in WAYS; they must include transformers' step and the
    matrix products, to which the ratios refer. commit: see environment(). keep: called with the
    result so far after every round.

    Raises LossMismatch if a model's losses, without dropout, differ from those of transformers'
    model.
    """
    about = {"benchmark": "step", **_about(size, rounds, commit)}
    return {**about, **_measured(size, rounds, say, ways, keep=_beside(about, keep))}


def bench_sweep(
    sweep: str, size: Size, rounds: int, say: Say, commit: str | None = None, keep: Keep | None = None
) -> dict[str, Any]:
    """Time the steps of one of SWEEPS, and return the result, JSON-ready.

    In the sweeps adapters, methods, recompute and graphs, all steps take turns in one run;
    recompute also counts the bytes that forward keeps for backward. The sweeps tokens, tasks and
    precisions time one size after another; each is a named entry of `points` in the result. keep:
    called with the result so far after every round, or after every point. Raises LossMismatch like
    bench_step.
    """
    about = {"benchmark": f"step --sweep {sweep}", **_about(size, rounds, commit)}
    if sweep in BY_TURNS:
        count = sweep == "recompute"
        return {**about, **_measured(size, rounds, say, BY_TURNS[sweep], count_bytes=count, keep=_beside(about, keep))}
    sizes = {
        "tokens": {f"{n:,} tokens": dataclasses.replace(size, tokens=n) for n in TOKENS},
        "tasks": {f"{n} tasks": dataclasses.replace(size, tasks=n, tokens=size.tokens or TOKENS[1]) for n in TASKS},
        "precisions": {name: dataclasses.replace(size, precision=name) for name in PRECISIONS},
    }[sweep]
    points: list[dict[str, Any]] = []
    for name, point in sizes.items():
        points.append({"name": name, **_measured(point, rounds, say, DEFAULT)})
        if keep is not None:
            keep({**about, "points": points})
    return {**about, "points": points}


def _beside(about: dict[str, Any], keep: Keep | None) -> Keep | None:
    return None if keep is None else lambda measured: keep({**about, **measured})


def _about(size: Size, rounds: int, commit: str | None) -> dict[str, Any]:
    return {
        "environment": environment(torch.device(size.device), commit),
        "shape": dataclasses.asdict(size.shape),
        "rounds": rounds,
        "dropout": DROPOUT,
        "precision": size.precision,
        "tasks": size.tasks,
    }


def _measured(
    size: Size,
    rounds: int,
    say: Say,
    ways: Sequence[str],
    *,
    count_bytes: bool = False,
    keep: Keep | None = None,
) -> dict[str, Any]:
    say("building models")
    workload = Workload(dataclasses.replace(size, dropout=DROPOUT))
    losses = padded_losses(workload, workload.padded)
    steps: dict[str, Step] = {}
    skipped: dict[str, str] = {}
    largest = 0.0
    for name in ways:
        say(f"comparing losses: {name}")
        try:
            steps[name], error = checked(name, workload, losses)
            largest = max(largest, error)
        except Skipped as reason:
            skipped[name] = str(reason)
    torch.manual_seed(SEED)
    for name, step in steps.items():
        say(f"warm-up: {name}")
        step()
    about = {
        "precision": size.precision,
        "tasks": workload.tasks,
        "tokens": workload.packed_batch.num_tokens,
        "padded_tokens": workload.num_padded,
        "loss_error": largest,
    }

    def after_round(samples: dict[str, list[float]]) -> None:
        if keep is not None:
            keep({**about, "steps": _ratios(samples), "skipped": skipped})

    found = _ratios(interleave(steps, rounds, say, workload.device, after_round=after_round))
    for name, entry in found.items():
        say(f"counting operators: {name}")
        entry["operator_calls"] = operator_calls(steps[name])._asdict()
    peer = found[TRANSFORMERS]
    for entry in found.values():
        entry["calls_to_transformers"] = {
            key: calls / peer["operator_calls"][key] for key, calls in entry["operator_calls"].items()
        }
    if count_bytes:
        for name, entry in found.items():
            say(f"counting bytes: {name}")
            model = WAYS[name].model
            entry |= {} if model is None else kept_bytes(workload, model)
    return {**about, "steps": found, "skipped": skipped}


def _ratios(samples: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Return a summary of each step's samples, with its ratios to two of the steps.

    The ratios are to the times of transformers' step and of the matrix products.
    """
    found = {name: summary(seconds) for name, seconds in samples.items()}
    for entry in found.values():
        entry["ratio_to_transformers"] = entry["median_s"] / found[TRANSFORMERS]["median_s"]
        entry["ratio_to_products"] = entry["median_s"] / found[PRODUCTS]["median_s"]
    return found


def checked(name: str, workload: Workload, losses: Sequence[float]) -> tuple[Step, float]:
    """Compare the losses of a model; return its step, ready to run, and the largest relative error.

    name: one of WAYS. losses: the losses of transformers' model. Raises Skipped with the reason if
    the step cannot run, and LossMismatch if an error is too large.
    """
    tolerance = TOLERANCES[workload.dtype]
    way = WAYS[name]
    if way.model is None:
        return way.build(workload, workload.padded), 0.0
    model = way.model(workload)
    found = padded_losses(workload, model) if isinstance(model, PaddedModel) else _packed_losses(workload, model)
    largest = 0.0
    for task, (loss, expected) in enumerate(zip(found, losses, strict=True)):
        error = abs(loss - expected) / abs(expected)
        if not error <= tolerance:
            raise LossMismatch(f"{name}: the loss of task {task} is off by {error:.1e}, allowed {tolerance:.1e}")
        largest = max(largest, error)
    return way.build(workload, model.train()), largest


@torch.no_grad()
def padded_losses(workload: Workload, model: PaddedModel) -> list[float]:
    """Return the mean loss of each task on its padded batch, without dropout."""
    model.eval()
    return [float(model.loss(task, model.features(b), b)) for task, b in enumerate(workload.padded_batches)]


@torch.no_grad()
def _packed_losses(workload: Workload, model: MultiTaskModel) -> list[float]:
    model.eval()
    return [float(loss_sum / count) for loss_sum, count in model(workload.packed_batch).values()]
