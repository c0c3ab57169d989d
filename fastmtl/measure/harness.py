"""Timing of several variants in turn, and the peak memory of one variant alone.

A machine that slows down for a minute slows down all variants, since they take turns. So the ratios
between the variants hold, though the times do not.
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
# A time on a GPU is the mean of this many steps. The steps are queued without a wait, so the
# launches of one step overlap the previous step, as in a training loop.
GPU_STEPS = 10
CPU = torch.device("cpu")
Result = TypeVar("Result")
# Shows a progress line that replaces the previous one.
Say = Callable[[str], None]
# Saves the result so far, JSON-ready, so that a killed process loses nothing.
Keep = Callable[[dict[str, Any]], None]


class Skipped(Exception):
    """Raised for a variant that cannot run here; the message is the reason."""


class WrongResult(RuntimeError):
    """Raised if a measured function returns a wrong result. Its time would be meaningless."""


def seconds(step: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one step.

    On a GPU this is the mean of GPU_STEPS steps by the GPU's own clock. One more step runs before
    and does not count, because it finds the GPU idle.
    """
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
    half_as_often: Collection[str] = (),
    measure: Callable[[Any, torch.device], Any] = seconds,
    after_round: Callable[[dict[str, list[Any]]], None] | None = None,
) -> dict[str, list[Any]]:
    """Measure the steps in turn, A B C, A B C, ..., and return the samples of each step.

    steps: by name; every step must have run before. rounds: how often each step is measured.
    measure: returns one sample of a step. half_as_often: steps that run in every other round only.
    after_round: called with the samples so far.
    """
    samples: dict[str, list[Any]] = {name: [] for name in steps}
    for index in range(rounds):
        say(f"round {index + 1} of {rounds}")
        for name, step in steps.items():
            if name not in half_as_often or index % 2 == 0:
                samples[name].append(measure(step, device))
        if after_round is not None:
            after_round(samples)
    return samples


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """Return median_s, the quantiles p20_s and p80_s, and samples_s of times in seconds.

    The 20 % and 80 % quantiles are the nearest samples.
    """
    ordered = sorted(samples)
    low, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.8))
    return {"median_s": statistics.median(ordered), "p20_s": low, "p80_s": high, "samples_s": list(samples)}


def in_own_process(function: Callable[..., Result], *arguments: Any, preload: str) -> Result:
    """Call function(*arguments) in a new process; return its result, or raise its error.

    preload: the module that the fork server imports. Only the first call in this process sets it.
    """
    # A fork server that has only imported modules saves seconds. A process also starts with the
    # server's small resident set, not with the memory that this process has used so far.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def peak_bytes(process: int | str = "self") -> int | None:
    """Return the largest resident set of a process so far (VmHWM of Linux); None if unknown."""
    return _status("VmHWM:", process)


class HeapBytes(NamedTuple):
    """Bytes that glibc's malloc manages.

    in_use, free: used and unused bytes of the heap. mapped: bytes of blocks outside the heap, each
    mapped separately.
    """

    in_use: int
    free: int
    mapped: int


def heap_bytes() -> HeapBytes:
    """Return the bytes that malloc manages, from mallinfo2 of <malloc.h>, in glibc since 2.33."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _MallInfo
    found = mallinfo2()
    return HeapBytes(found.uordblks, found.fordblks, found.hblkhd)


class _MallInfo(ctypes.Structure):
    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in _names]


def resident_bytes() -> int | None:
    """Return the current resident set of this process; None on systems other than Linux."""
    return _status("VmRSS:")


def _status(key: str, process: int | str = "self") -> int | None:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):  # the process has ended
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), None)


def reset_peak_bytes(process: int | str = "self") -> bool:
    """Make peak_bytes start again from now (Linux's clear_refs). Return False on other systems."""
    try:
        Path(f"/proc/{process}/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def gpu_peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Run a step; return the peak bytes of torch's GPU allocator, which include older tensors."""
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def graph_pool_bytes(device: torch.device) -> int:
    """Return the bytes that CUDA graphs hold on the GPU and torch does not count as allocated.

    After capture, a graph's intermediate tensors are free blocks of its private memory pool. Only
    replays of the graph may write to these blocks.
    """
    torch.cuda.synchronize(device)
    segments = [entry for entry in torch.cuda.memory_snapshot() if tuple(entry["segment_pool_id"]) != (0, 0)]
    index = torch.cuda.current_device() if device.index is None else device.index
    return sum(entry["total_size"] - entry["allocated_size"] for entry in segments if entry["device"] == index)
