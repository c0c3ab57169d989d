"""Benchmark of gradient surgery on models of other libraries: time and memory of each way."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from fastmtl.bench.models.ways import JOINT, STACKED, WAYS, build
from fastmtl.bench.models.workload import ModelWorkload
from fastmtl.bench.sizes import Size
from fastmtl.bench.surgery import check_variants, entries, gpu_peak_of_step, peak_of_steps
from fastmtl.errors import unknown_name
from fastmtl.measure.environment import environment
from fastmtl.measure.harness import MIB, Keep, Say, in_own_process, interleave
from fastmtl.surgery.costs import storage_costs

PRELOAD = "fastmtl.bench.models.run"


def check_ways(names: Sequence[str]) -> tuple[str, ...]:
    """Return the ways to measure, the joint step first; all ways if no name is given.

    Raises UserError for an unknown name.
    """
    for name in names:
        if name not in WAYS:
            raise unknown_name("--way", name, WAYS)
    return tuple({JOINT: None, **dict.fromkeys(names or WAYS)})


def bench_model(
    model: str,
    size: Size,
    rounds: int,
    say: Say,
    ways: Sequence[str] = tuple(WAYS),
    commit: str | None = None,
    keep: Keep | None = None,
    *,
    same_rows: bool = False,
) -> dict[str, Any]:
    """Measure times and peak memory of ways to compute a step, and return the result, JSON-ready.

    model: a key of MODELS. size: its tokens and dropout are ignored. ways: from check_ways. commit,
    keep: as in bench_variants, whose result has the same form. same_rows: True for T losses of the
    same rows.

    Raises GradientMismatch if a way's gradient is not the textbook's, before anything is timed.
    """
    say("building models")
    workload = ModelWorkload(model, size, same_rows=same_rows)
    checked, errors, skipped = check_variants(workload, {name: partial(build, name, workload) for name in ways}, say)
    peers = [variant.name for variant in checked if variant.peer]
    peaks: dict[str, int | None] = {}
    shown = f"{model}, same rows" if same_rows else model
    j = storage_costs(workload.padded.encoder, tasks=workload.tasks)["stacked"]
    about = {
        "benchmark": f"surgery {shown}",
        "environment": environment(workload.device, commit),
        "model": shown,
        "shape": dataclasses.asdict(size.shape),
        "precision": size.precision,
        "tasks": workload.tasks,
        "rounds": rounds,
        "tokens": workload.tokens[0],
        "padded_tokens": workload.tokens[1],
        "compact_rows_mib": workload.tokens[1] * j.per_row / MIB,
        "skipped": skipped,
    }
    stored = dict.fromkeys(STACKED, j.nbytes)

    def result(samples: dict[str, list[float]]) -> dict[str, Any]:
        return {**about, "variants": entries(samples, errors, peaks, (JOINT,), stored)}

    def kept(samples: dict[str, list[float]]) -> None:
        if keep is not None:
            keep(result(samples))

    steps = {variant.name: variant.step for variant in checked}
    samples = interleave(steps, rounds, say, workload.device, half_as_often=peers, after_round=kept)
    checked.clear()
    steps.clear()
    for name in samples:
        say(f"peak memory: {name}")
        if workload.device.type == "cuda":
            workload.padded.zero_grad()
            peaks[name] = gpu_peak_of_step(partial(build, name, workload), workload.device)
        else:
            peaks[name] = in_own_process(
                peak_of, name, model, size, same_rows, torch.get_num_threads(), preload=PRELOAD
            )
        kept(samples)
    return result(samples)


def peak_of(name: str, model: str, size: Size, same_rows: bool, threads: int) -> int | None:
    """Return the peak resident bytes of this process after steps of a way; None if unknown."""
    return peak_of_steps(lambda: build(name, ModelWorkload(model, size, same_rows=same_rows)), threads)
