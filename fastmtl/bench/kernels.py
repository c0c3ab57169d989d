"""Benchmark of the operations of fastmtl_kernels, their alternatives, and the machine's speed.

The machine's speed is measured in the same run. Memory: a copy that moves as many bytes as the
operation must read and write (half of them are read, half written), in turn with the
implementations. Arithmetic: one large matrix product.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from fastmtl.bench import ops
from fastmtl.bench.laps import Chain, clock
from fastmtl.bench.ops.case import EAGER, Case
from fastmtl.bench.sizes import PRECISIONS, SEED, Size
from fastmtl.errors import unknown_name
from fastmtl.measure.environment import environment
from fastmtl.measure.harness import (
    MIB,
    Keep,
    Say,
    Skipped,
    WrongResult,
    gpu_peak_bytes,
    in_own_process,
    interleave,
    peak_bytes,
    reset_peak_bytes,
    resident_bytes,
    summary,
)
from fastmtl.measure.heap import free_at_once

COPY = "copy"
BOTH = "both"
GPU_GEMM = 8192


def bench_kernels(
    size: Size,
    rounds: int,
    say: Say,
    operations: Sequence[str] = ops.OPERATIONS,
    impls: Sequence[str] = (),
    commit: str | None = None,
    without: Sequence[str] = (),
    keep: Keep | None = None,
) -> dict[str, Any]:
    """Measure times and peak memory of operations, and return the result, JSON-ready.

    impls: only implementations with one of these words in their name are measured, such as "cpp",
    "eager" or "fastmtl"; all if empty. without: implementations with one of these words in their
    name are left out. commit: see environment(). keep: called with the result so far after every
    case.

    Raises WrongResult if an implementation of fastmtl disagrees with the oracle, before its
    operation is timed, and UserError for an unknown operation. Other implementations that disagree
    or cannot run are skipped, with their reason in the result.
    """
    device = torch.device(size.device)
    found: dict[str, Any] = {}
    laps = clock(device)
    say("matrix product")
    gemm = _gemm(size, rounds, laps.laps)
    result = {
        "benchmark": "kernels",
        "environment": environment(device, commit),
        "shape": dataclasses.asdict(size.shape),
        "precision": size.precision,
        "tasks": size.tasks,
        "dropout": size.dropout,
        "rounds": rounds,
        "gemm": gemm,
        "operations": found,
    }
    for operation in operations:
        for case in ops.cases(operation, size):
            found[case.name] = _case(case, impls, without, rounds, say, laps.laps, gemm["tflop_per_s"])
            if keep is not None:
                keep(result)
    say("peak memory")
    names = {name: [way for way in entry["passes"]["forward"] if way != COPY] for name, entry in found.items()}
    if device.type == "cuda":
        peaks = _peaks(size, operations, names)
    else:
        threads = torch.get_num_threads()
        peaks = in_own_process(_peaks, size, operations, names, threads, preload=__name__)
    for name, entry in found.items():
        entry["peak_mib"] = {way: None if peak is None else peak / MIB for way, peak in peaks[name].items()}
    return result


def runnable(
    case: Case, impls: Sequence[str] = (), without: Sequence[str] = ()
) -> tuple[dict[str, Chain], dict[str, float], dict[str, str]]:
    """Check every implementation of a case; return (chains, errors, reasons), each by its name.

    chains: the functions to time, forward and backward, of each implementation that agrees with the
    oracle. errors: the largest error as a share of the allowed one. reasons: why an implementation
    is skipped. impls, without, and errors that are raised: as in bench_kernels.
    """
    chains: dict[str, Chain] = {}
    errors: dict[str, float] = {}
    skipped: dict[str, str] = {}
    for way in case.ways:
        if (impls and not _named(way.name, impls)) or _named(way.name, without):
            continue
        try:
            run = way.build()
            errors[way.name] = case.check(way, run)
            chain, _ = case.chain(way, run)
            forward_and_backward(chain)  # with dropout, since the check may have run without it
        except Skipped as reason:
            skipped[way.name] = str(reason)
        except Exception as error:
            if way.ours:
                raise
            first = next(iter(str(error).strip().splitlines()), "")
            skipped[way.name] = first if isinstance(error, WrongResult) else f"{type(error).__name__}: {first}"
        else:
            chains[way.name] = chain
    return chains, errors, skipped


def _named(way: str, words: Sequence[str]) -> bool:
    return any(word in (way, *way.split()) for word in words)


def forward_and_backward(chain: Chain) -> None:
    value = None
    for link in chain:
        value = link(value)


def check_impls(impls: Sequence[str], size: Size, operations: Sequence[str]) -> None:
    """Raise UserError if a word of `impls` is in no implementation's name."""
    names = way_names(operations, size)
    valid = names | {word for name in names if name.startswith("fastmtl ") for word in name.split()}
    for impl in impls:
        if impl not in valid:
            raise unknown_name("implementation", impl, valid)


def way_names(operations: Sequence[str], size: Size) -> set[str]:
    """Return the names of all implementations of these operations on the size's device."""
    tiny = dataclasses.replace(size, shape=ops.TINY, tokens=None)
    return {way.name for operation in operations for case in ops.cases(operation, tiny) for way in case.ways}


def _case(
    case: Case,
    impls: Sequence[str],
    without: Sequence[str],
    rounds: int,
    say: Say,
    laps: Callable[[Chain], list[float]],
    gemm: float,
) -> dict[str, Any]:
    say(f"checking results: {case.name}")
    chains, errors, skipped = runnable(case, impls, without)
    if case.work:
        chains[COPY] = _copies(case)
    samples = interleave(chains, rounds, say, measure=lambda chain, _: laps(chain))
    passes: dict[str, dict[str, Any]] = {}
    for index, name in enumerate(case.passes):
        passes[name] = {way: summary([lap[index] for lap in found]) for way, found in samples.items()}
    if len(case.passes) > 1:
        passes[BOTH] = {way: summary([sum(lap) for lap in found]) for way, found in samples.items()}
    work = {name: (entry.bytes, entry.flops) for name, entry in case.work.items()}
    work[BOTH] = tuple(map(sum, zip(*work.values(), strict=True))) if work else (0, 0)  # type: ignore[assignment]
    for name, ways in passes.items():
        for entry in ways.values():
            _rates(entry, ways, work.get(name), gemm)
            entry["tokens_per_s"] = None if case.tokens is None else case.tokens / entry["median_s"]
    return {
        "about": case.about,
        "tokens": case.tokens,
        "dropout": case.dropout,
        "work": {name: {"bytes": moved, "flops": flops} for name, (moved, flops) in work.items() if name in passes},
        "passes": passes,
        "peak_mib": {},
        "errors": errors,
        "skipped": skipped,
    }


def _rates(entry: dict[str, Any], ways: dict[str, Any], work: tuple[float, float] | None, gemm: float) -> None:
    median = entry["median_s"]
    entry["ratio_to_eager"] = median / ways[EAGER]["median_s"] if EAGER in ways else None
    if work is None or COPY not in ways:
        return
    moved, flops = work
    copy = entry is ways[COPY]
    entry["gb_per_s"] = moved / median / 1e9
    entry["share_of_copy"] = ways[COPY]["median_s"] / median
    entry["tflop_per_s"] = None if copy else flops / median / 1e12
    entry["share_of_gemm"] = None if copy else flops / median / 1e12 / gemm


def _copies(case: Case) -> Chain:
    """Return one copy for each pass, which moves as many bytes as the pass must read and write."""
    sizes = [int(case.work[name].bytes) // 2 for name in case.passes]
    device = next(iter(case.tensors.values())).device
    source, target = (torch.zeros(max(sizes), dtype=torch.uint8, device=device) for _ in range(2))
    pairs = [(target[:size], source[:size]) for size in sizes]
    return [partial(lambda to, of, _: to.copy_(of), to, of) for to, of in pairs]


def _gemm(size: Size, rounds: int, laps: Callable[[Chain], list[float]]) -> dict[str, Any]:
    width = GPU_GEMM if size.device == "cuda" else 4 * size.shape.hidden
    generator = torch.Generator(size.device).manual_seed(SEED)
    dtype = PRECISIONS[size.precision]
    left, right = (torch.randn(width, width, generator=generator, device=size.device).to(dtype) for _ in range(2))
    chain: Chain = [lambda _: left @ right]
    forward_and_backward(chain)
    entry = summary([laps(chain)[0] for _ in range(rounds)])
    return {"width": width, "tflop_per_s": 2 * width**3 / entry["median_s"] / 1e12, **entry}


def _peaks(
    size: Size, operations: Sequence[str], names: Mapping[str, Sequence[str]], threads: int | None = None
) -> dict[str, dict[str, int | None]]:
    """Return the peak bytes beyond the inputs of forward and backward, by case and implementation.

    names: the implementations to run, by case. threads: the number of threads to set, in a separate
    process on a CPU; None on a GPU. A peak that cannot be measured is None.
    """
    if threads is not None:
        torch.set_num_threads(threads)
        free_at_once()
    device = torch.device(size.device)
    found: dict[str, dict[str, int | None]] = {}
    for operation in operations:
        for case in ops.cases(operation, size):
            found[case.name] = {}
            for name in names[case.name]:
                way = case.way(name)
                chain, _ = case.chain(way, way.build())
                forward_and_backward(chain)
                found[case.name][name] = _peak(chain, device)
    return found


def _peak(chain: Chain, device: torch.device) -> int | None:
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        return gpu_peak_bytes(lambda: forward_and_backward(chain), device) - before
    resident = resident_bytes()
    if resident is None or not reset_peak_bytes():
        return None
    forward_and_backward(chain)
    peak = peak_bytes()
    return None if peak is None else max(peak - resident, 0)
