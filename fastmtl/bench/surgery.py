"""What PCGrad costs over a joint step: time and memory of every variant, and the time over the number of tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from fastmtl.bench.harness import MIB, Say, environment, in_own_process, interleave, peak_bytes, summary
from fastmtl.bench.oracle import Oracle
from fastmtl.bench.variants import BUILDERS, JOINT, STACKED, Skipped, Variant, build
from fastmtl.bench.workload import Shape, Workload

TASKS = (2, 4, 8, 16, 32)
TASK_VARIANTS = ("sum", "pcgrad stacked")


def bench_variants(shape: Shape, rounds: int, say: Say, variants: Sequence[str] = tuple(BUILDERS)) -> dict[str, Any]:
    """All variants on one shape, JSON-ready: times by turns in this process, peak memory each in its own.

    variants: with both of JOINT and the textbook, which the ratios are of.
    Raises GradientMismatch where a variant's gradient is not the textbook's, before anything is timed.
    """
    say("building models")
    workload = Workload(shape)
    checked, errors, skipped = _checked(workload, variants, say)
    samples = interleave({variant.name: variant.step for variant in checked}, rounds, say)
    peaks = {}
    for variant in checked:
        say(f"peak memory: {variant.name}")
        peaks[variant.name] = in_own_process(_peak, variant.name, shape, torch.get_num_threads())
    found: dict[str, dict[str, Any]] = {name: summary(seconds) for name, seconds in samples.items()}
    joint = min(found[name]["median_s"] for name in JOINT)
    dense = sum(p.numel() for p in workload.packed.shared_parameters())
    dense -= sum(p.numel() for p in workload.packed.sparse_parameters())
    for name, entry in found.items():
        peak, joint_peak = peaks[name], peaks["autograd"]
        entry["ratio_to_joint"] = entry["median_s"] / joint
        entry["ratio_to_textbook"] = entry["median_s"] / found["textbook"]["median_s"]
        entry["error"] = errors[name]
        entry["peak_mib"] = None if peak is None else peak / MIB
        entry["peak_above_joint_mib"] = None if peak is None or joint_peak is None else (peak - joint_peak) / MIB
        entry["j_mib"] = workload.tasks * dense * STACKED[name] / MIB if name in STACKED else None
    return {
        "benchmark": "surgery",
        "environment": environment(),
        "shape": dataclasses.asdict(shape),
        "tasks": workload.tasks,
        "rounds": rounds,
        "tokens": workload.packed_batch.num_tokens,
        "padded_tokens": workload.num_padded,
        "compact_rows_mib": workload.packed_batch.num_tokens * (shape.hidden * 4 + 8) / MIB,
        "variants": found,
        "skipped": skipped,
    }


def bench_tasks(
    shape: Shape, rounds: int, say: Say, tokens: int = 8192, numbers: Sequence[int] = TASKS
) -> dict[str, Any]:
    """`sum` and PCGrad with more and more tasks in equally many tokens, JSON-ready; `relative`: to the fewest tasks.

    Raises GradientMismatch as bench_variants.
    """
    steps, sizes = {}, {}
    for number in numbers:
        say(f"building models: {number} tasks")
        workload = Workload(shape, number, tokens)
        sizes[number] = workload.packed_batch.num_tokens
        checked, _, _ = _checked(workload, TASK_VARIANTS, say)
        steps.update({(number, variant.name): variant.step for variant in checked})
    names = {f"{name}, {number} tasks": step for (number, name), step in steps.items()}
    samples = dict(zip(steps, interleave(names, rounds, say).values(), strict=True))
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
        "benchmark": "surgery --tasks",
        "environment": environment(),
        "shape": dataclasses.asdict(shape),
        "rounds": rounds,
        "points": points,
    }


def _checked(
    workload: Workload, names: Sequence[str], say: Say
) -> tuple[list[Variant], dict[str, float], dict[str, str]]:
    """The variants whose gradients are right, their errors, and the reasons of those that cannot run."""
    say("gradients of the textbook loop")
    oracle = Oracle(workload)
    checked, errors, skipped = [], {}, {}
    for name in names:
        say(f"checking gradients: {name}")
        try:
            variant = build(name, workload)
            errors[name] = oracle.check(variant)
        except Skipped as reason:
            skipped[name] = str(reason)
        else:
            checked.append(variant)
    return checked, errors, skipped


def _peak(name: str, shape: Shape, threads: int) -> int | None:
    """Peak bytes of a process that has made two steps: the second finds J, and buffers of the allocator, in place."""
    torch.set_num_threads(threads)
    variant = build(name, Workload(shape))
    for _ in range(2):
        variant.step()
    return peak_bytes()
