"""Times of several variants taken in turns, and the peak memory of one alone.

A machine that slows down for a minute slows down all variants that take turns: their ratios hold, their times do not.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

MIB = 2**20
# Steps that a time on a GPU is the mean of. They are queued one after another, so a step's launches overlap the one
# before, as in a training loop.
GPU_STEPS = 10
CPU = torch.device("cpu")
Result = TypeVar("Result")
# Tells what is going on: a line that the next one replaces.
Say = Callable[[str], None]
# Takes what a benchmark has measured so far, JSON-ready, so that a process that is killed leaves it.
Keep = Callable[[dict[str, Any]], None]


class Skipped(Exception):
    """What cannot run here; the message is the reason."""


class WrongResult(RuntimeError):
    """Something does not compute what it should: its time would mean nothing."""


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


def interleave(
    steps: Mapping[str, Any],
    rounds: int,
    say: Say,
    device: torch.device = CPU,
    seldom: Collection[str] = (),
    measure: Callable[[Any, torch.device], Any] = seconds,
    after_round: Callable[[dict[str, list[Any]]], None] | None = None,
) -> dict[str, list[Any]]:
    """What `measure` finds of each step in every round: A B C, A B C, ... Every step has run before, to be checked.

    seldom: steps that take their turn in every other round. after_round: takes the samples so far.
    """
    samples: dict[str, list[Any]] = {name: [] for name in steps}
    for index in range(rounds):
        say(f"round {index + 1} of {rounds}")
        for name, step in steps.items():
            if name not in seldom or index % 2 == 0:
                samples[name].append(measure(step, device))
        if after_round is not None:
            after_round(samples)
    return samples


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """Median, 20 % and 80 % quantiles (the nearest samples), and the samples themselves; seconds."""
    ordered = sorted(samples)
    low, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.8))
    return {"median_s": statistics.median(ordered), "p20_s": low, "p80_s": high, "samples_s": list(samples)}


def in_own_process(function: Callable[..., Result], *arguments: Any, preload: str = "fastmtl.bench.surgery") -> Result:
    """function(*arguments) in a process that has run nothing else; what it raises is raised here.

    preload: the module that the server imports, of the first call in this process.
    """
    # Forked from a server that has only imported: it saves seconds, and a process begins with the server's small
    # resident set, not with what this one has used so far.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def peak_bytes(process: int | str = "self") -> int | None:
    """The largest resident set of a process so far; None where the system does not tell (it is Linux's VmHWM)."""
    return _status("VmHWM:", process)


class HeapBytes(NamedTuple):
    """Of glibc's malloc: in the heap those in use and those free, and those of blocks that are mapped."""

    in_use: int
    free: int
    mapped: int


def heap_bytes() -> HeapBytes:
    """By mallinfo2 of <malloc.h>, which glibc has since 2.33."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _MallInfo
    found = mallinfo2()
    return HeapBytes(found.uordblks, found.fordblks, found.hblkhd)


class _MallInfo(ctypes.Structure):
    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in _names]


def resident_bytes() -> int | None:
    """The resident set of this process now; None where the system does not tell."""
    return _status("VmRSS:")


def _status(key: str, process: int | str = "self") -> int | None:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):  # another may end meanwhile
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), None)


def forget_peak(process: int | str = "self") -> bool:
    """Peak memory of a process counts from here on; False where the system cannot (it is Linux's clear_refs)."""
    try:
        Path(f"/proc/{process}/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def gpu_peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """The most that torch's allocator held on the GPU during a step, with all that was there before."""
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def graph_pool_bytes(device: torch.device) -> int:
    """Return what CUDA graphs keep of the GPU beside the tensors that torch counts as allocated.

    A graph's intermediates are free blocks of its private pool once it is captured: replays write there, and nothing
    else may.
    """
    torch.cuda.synchronize(device)
    segments = [entry for entry in torch.cuda.memory_snapshot() if tuple(entry["segment_pool_id"]) != (0, 0)]
    index = torch.cuda.current_device() if device.index is None else device.index
    return sum(entry["total_size"] - entry["allocated_size"] for entry in segments if entry["device"] == index)
