"""Times of several variants taken in turns, the peak memory of one in a process of its own, and where it was measured.

A machine that slows down for a minute slows down all variants that take turns: their ratios hold, their times do not.
"""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

from fastmtl import __version__

MIB = 2**20
Result = TypeVar("Result")
# Tells what is going on: a line that the next one replaces.
Say = Callable[[str], None]


def interleave(steps: Mapping[str, Callable[[], object]], rounds: int, say: Say) -> dict[str, list[float]]:
    """Seconds of each step in every round: A B C, A B C, ... Every step has run before, to be checked."""
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(rounds):
        for name, step in steps.items():
            say(f"round {index + 1} of {rounds}: {name}")
            begin = time.perf_counter()
            step()
            samples[name].append(time.perf_counter() - begin)
    return samples


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


def peak_bytes() -> int | None:
    """The largest resident set of this process so far; None where the system does not tell (it is Linux's VmHWM)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = status.read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def environment() -> dict[str, Any]:
    """What a result depends on beside the code: processor, threads, versions, and the commit where there is one."""
    return {
        "device": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "torchjd": _version("torchjd"),
        "fastmtl": __version__,
        "commit": _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """The checkout's commit, with `-dirty` where tracked files differ; None for an installed package."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
