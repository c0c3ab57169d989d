"""Times of several variants taken in turns, and the peak memory of one alone.

A machine that slows down for a minute slows down all variants that take turns: their ratios hold, their times do not.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

MIB = 2**20
_M_MMAP_THRESHOLD = -3  # of <malloc.h>
# Steps that a time on a GPU is the mean of. They are queued one after another, so a step's launches overlap the one
# before, as in a training loop.
GPU_STEPS = 10
CPU = torch.device("cpu")
Result = TypeVar("Result")
# Tells what is going on: a line that the next one replaces.
Say = Callable[[str], None]


def interleave(
    steps: Mapping[str, Callable[[], object]],
    rounds: int,
    say: Say,
    device: torch.device = CPU,
    seldom: Collection[str] = (),
) -> dict[str, list[float]]:
    """Seconds of each step in every round: A B C, A B C, ... Every step has run before, to be checked.

    seldom: steps that take their turn in every other round.
    """
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(rounds):
        say(f"round {index + 1} of {rounds}")
        for name, step in steps.items():
            if name not in seldom or index % 2 == 0:
                samples[name].append(seconds(step, device))
    return samples


def seconds(step: Callable[[], object], device: torch.device) -> float:
    """Of one step. On a GPU by its own clock, the mean of GPU_STEPS after one that finds it idle and is not counted."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        step()
        begin.record()
        for _ in range(GPU_STEPS):
            step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / GPU_STEPS
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """Median, 20 % and 80 % quantiles (the nearest samples), and the samples themselves; seconds."""
    ordered = sorted(samples)
    low, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.8))
    return {"median_s": statistics.median(ordered), "p20_s": low, "p80_s": high, "samples_s": list(samples)}


def in_own_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """function(*arguments) in a process that has run nothing else; what it raises is raised here."""
    # Forked from a server that has only imported: it saves seconds, and a process begins with the server's small
    # resident set, not with what this one has used so far.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastmtl.bench.surgery"])
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def free_at_once() -> None:
    """Large blocks of this process go back to the system when they are freed, where its malloc is glibc's.

    By default glibc keeps them, in a heap whose holes add up to 10 to 25 % of a step's peak, more or less by chance.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if platform.libc_ver()[0] == "glibc" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, MIB)


def peak_bytes() -> int | None:
    """The largest resident set of this process so far; None where the system does not tell (it is Linux's VmHWM)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = status.read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def gpu_peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """The most that torch's allocator held on the GPU during a step, with all that was there before."""
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)
