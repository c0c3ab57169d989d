"""Benchmark of PCGrad and a joint step: time and memory by variant, time by number of tasks."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from fastmtl.bench.oracle import Checkable, Oracle
from fastmtl.bench.sizes import Size
from fastmtl.bench.variants import BUILDERS, JOINT, STACKED, Skipped, Variant, build
from fastmtl.bench.workload import Workload
from fastmtl.measure.environment import environment
from fastmtl.measure.harness import (
    MIB,
    Keep,
    Say,
    gpu_peak_bytes,
    graph_pool_bytes,
    in_own_process,
    interleave,
    peak_bytes,
    summary,
)
from fastmtl.measure.heap import free_at_once

Builder = Callable[[], Variant]
TASKS = (2, 4, 8, 16, 32)
TASK_TOKENS = 8192
TASK_VARIANTS = ("sum", "pcgrad stacked")


def bench_variants(
    size: Size,
    rounds: int,
    say: Say,
    variants: Sequence[str] = tuple(BUILDERS),
    commit: str | None = None,
    keep: Keep | None = None,
) -> dict[str, Any]:
    """Measure times and peak memory of variants of a step, and return the result, JSON-ready.

    The variants are timed in turn in this process. The peak memory is measured for each variant
    alone. variants: names; they must include both of JOINT and the textbook, to which the ratios
    refer. Variants of other libraries take several times longer, so they run in every other round
    only. commit: see environment(). keep: called with the result so far after every round, and
    after the peak memory of each variant.

    Raises GradientMismatch if a variant's gradient is not the textbook's, before anything is timed.
    """
    say("building models")
    workload = Workload(size)
    checked, errors, skipped = check_variants(workload, _builders(variants, workload), say)
    steps = {variant.name: variant.step for variant in checked}
    peers = [variant.name for variant in checked if variant.peer]
    peaks: dict[str, int | None] = {}
    row_bytes = size.shape.hidden * workload.dtype.itemsize + 8
    about = {
        "benchmark": "surgery",
        "environment": environment(workload.device, commit),
        "shape": dataclasses.asdict(size.shape),
        "precision": size.precision,
        "tasks": workload.tasks,
        "rounds": rounds,
        "tokens": workload.packed_batch.num_tokens,
        "padded_tokens": workload.num_padded,
        "compact_rows_mib": workload.packed_batch.num_tokens * row_bytes / MIB,
        "skipped": skipped,
    }

    dense = sum(p.numel() for p in workload.packed.shared_parameters())
    dense -= sum(p.numel() for p in workload.packed.sparse_parameters())
    stored = {name: workload.tasks * dense * nbytes for name, nbytes in STACKED.items()}

    def result(samples: dict[str, list[float]]) -> dict[str, Any]:
        return {**about, "variants": entries(samples, errors, peaks, JOINT, stored)}

    def kept(samples: dict[str, list[float]]) -> None:
        if keep is not None:
            keep(result(samples))

    samples = interleave(steps, rounds, say, workload.device, half_as_often=peers, after_round=kept)
    checked.clear()
    steps.clear()
    for name in samples:
        say(f"peak memory: {name}")
        if workload.device.type == "cuda":
            peaks[name] = gpu_peak_of(name, workload)
        else:
            peaks[name] = in_own_process(peak_of, name, size, torch.get_num_threads(), preload=__name__)
        kept(samples)
    return result(samples)


def entries(
    samples: dict[str, list[float]],
    errors: dict[str, float],
    peaks: dict[str, int | None],
    joint: Sequence[str],
    stored: dict[str, int],
) -> dict[str, dict[str, Any]]:
    """Return a summary of every variant's samples, with its ratios and memory.

    peaks: the peak bytes of the variants that were measured so far. joint: names of the joint
    steps; times are compared with the fastest of them, and memory with the first. stored: bytes of
    J, for the variants that store J. Ratios to the textbook loop are None without it.
    """
    found: dict[str, dict[str, Any]] = {name: summary(seconds) for name, seconds in samples.items()}
    fastest = min(found[name]["median_s"] for name in joint)
    for name, entry in found.items():
        peak, joint_peak = peaks.get(name), peaks.get(joint[0])
        entry["ratio_to_joint"] = entry["median_s"] / fastest
        loop = found.get("textbook")
        entry["ratio_to_textbook"] = None if loop is None else entry["median_s"] / loop["median_s"]
        entry["error"] = errors[name]
        entry["peak_mib"] = None if peak is None else peak / MIB
        entry["peak_above_joint_mib"] = None if peak is None or joint_peak is None else (peak - joint_peak) / MIB
        entry["j_mib"] = stored[name] / MIB if name in stored else None
    return found


def bench_tasks(
    size: Size, rounds: int, say: Say, numbers: Sequence[int] = TASKS, commit: str | None = None
) -> dict[str, Any]:
    """Time `sum` and PCGrad with growing numbers of tasks, in equally many tokens.

    Returns the result, JSON-ready. `relative` in it is a time over that with the first of
    `numbers`. size: its tasks are ignored; if it has no tokens, TASK_TOKENS are used. Raises
    GradientMismatch like bench_variants.
    """
    steps, sizes = {}, {}
    device = torch.device(size.device)
    for number in numbers:
        say(f"building models: {number} tasks")
        workload = Workload(dataclasses.replace(size, tasks=number, tokens=size.tokens or TASK_TOKENS))
        sizes[number] = workload.packed_batch.num_tokens
        checked, _, _ = check_variants(workload, _builders(TASK_VARIANTS, workload), say)
        steps.update({(number, variant.name): variant.step for variant in checked})
    names = {f"{name}, {number} tasks": step for (number, name), step in steps.items()}
    samples = dict(zip(steps, interleave(names, rounds, say, device).values(), strict=True))
    points = []
    for number in numbers:
        entry: dict[str, Any] = {"tasks": number, "tokens": sizes[number]}
        for name in TASK_VARIANTS:
            entry[name] = summary(samples[number, name])
        points.append(entry)
    for entry in points:
        for name in TASK_VARIANTS:
            entry[name]["relative"] = entry[name]["median_s"] / points[0][name]["median_s"]
    return {
        "benchmark": "surgery --sweep",
        "environment": environment(device, commit),
        "shape": dataclasses.asdict(size.shape),
        "precision": size.precision,
        "rounds": rounds,
        "points": points,
    }


def _builders(names: Sequence[str], workload: Workload) -> dict[str, Builder]:
    return {name: partial(build, name, workload) for name in names}


def check_variants(
    workload: Checkable, builders: Mapping[str, Builder], say: Say
) -> tuple[list[Variant], dict[str, float], dict[str, str]]:
    """Check variants; return (correct variants, errors by name, reasons of the skipped ones).

    builders: by name, functions that build a variant, or raise Skipped. Raises GradientMismatch for
    a wrong gradient.
    """
    say("gradients of the textbook loop")
    oracle = Oracle(workload)
    checked, errors, skipped = [], {}, {}
    for name, builder in builders.items():
        say(f"checking gradients: {name}")
        try:
            variant = builder()
            errors[name] = oracle.check(variant)
        except Skipped as reason:
            skipped[name] = str(reason)
        else:
            checked.append(variant)
    return checked, errors, skipped


def peak_of(name: str, size: Size, threads: int) -> int | None:
    """Return the peak resident bytes of this process after steps of a variant; None if unknown."""
    return peak_of_steps(lambda: build(name, Workload(size)), threads)


def peak_of_steps(builder: Builder, threads: int) -> int | None:
    """Return the peak resident bytes of this process after two steps of a variant; None if unknown.

    The second step finds J and the allocator's buffers in place. A variant of another library keeps
    nothing between steps, so it runs one step only.
    """
    torch.set_num_threads(threads)
    free_at_once()
    variant = builder()
    for _ in range(1 if variant.peer else 2):
        variant.step()
    return peak_bytes()


def gpu_peak_of(name: str, workload: Workload) -> int:
    """Return the peak bytes on the GPU of a variant's second step, which finds J in place.

    No other variant's tensors are on the GPU then. The memory of CUDA graphs is included.
    """
    workload.packed.zero_grad()
    workload.padded.zero_grad()
    return gpu_peak_of_step(partial(build, name, workload), workload.device)


def gpu_peak_of_step(builder: Builder, device: torch.device) -> int:
    """Return the peak bytes on the GPU of a variant's second step, with tensors from before."""
    gc.collect()
    torch.cuda.empty_cache()  # frees the memory pools of deleted CUDA graphs
    variant = builder()
    variant.step()
    return gpu_peak_bytes(variant.step, device) + graph_pool_bytes(device)
