"""Clocks that time the forward and the backward of one operation separately in one run.

On CPUs, short functions are repeated until a sample is long enough to trust.

On GPUs, the GPU's own clock measures the time between two events. The cache is emptied before,
because in a training step the layers between two calls of an operation empty it. Emptying also
keeps the GPU busy while the host launches the timed kernels, so no launch delays them. A large
buffer is read to empty the cache. If it were written, the written lines would go to memory during
the timed operation. The operation and the copy that it is compared with would pay about the same
time for that, which would move their ratio towards 1.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from fastmtl.measure.harness import GPU_STEPS

# Functions; each is called with the result of the previous one, the first with None.
Chain = Sequence[Callable[[Any], Any]]
ENOUGH_S = 0.01
_LEAD = 1.5  # the GPU is kept busy this many times as long as the host needs for the timed function
_SWEEPS = 32  # most reads of the buffer; an operation of hundreds of kernels, or one that waits, would need too many
_LONGEST_S = 0.1  # most host time of a sample


class Clock(Protocol):
    def laps(self, chain: Chain) -> list[float]:
        """Return the mean seconds of each function of the chain over several runs.

        The chain must have run once before, so that its first call is not timed.
        """
        ...


def clock(device: torch.device) -> Clock:
    return GpuClock(device) if device.type == "cuda" else CpuClock()


class CpuClock:
    def laps(self, chain: Chain) -> list[float]:
        totals, runs = [0.0] * len(chain), 0
        while sum(totals) < ENOUGH_S:
            value = None
            for index, link in enumerate(chain):
                begun = time.perf_counter()
                value = link(value)
                totals[index] += time.perf_counter() - begun
            runs += 1
        return [total / runs for total in totals]


class GpuClock:
    """A clock for a GPU. It empties the L2 cache by reading a buffer of twice the cache's size."""

    def __init__(self, device: torch.device) -> None:
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        self._buffer = torch.zeros(size // 4, dtype=torch.float32, device=device)
        self._sum = torch.zeros((), device=device)
        self._empty_cache()  # compiles or loads the kernel
        self._sweep_s = self._events([lambda _: self._empty_cache()], [0], GPU_STEPS)[0]

    def laps(self, chain: Chain) -> list[float]:
        sweeps, total, value = [], 0.0, None
        for link in chain:
            torch.cuda.synchronize()
            begun = time.perf_counter()
            value = link(value)
            host = time.perf_counter() - begun
            sweeps.append(min(max(1, math.ceil(_LEAD * host / self._sweep_s)), _SWEEPS))
            total += host
        return self._events(chain, sweeps, max(1, min(GPU_STEPS, int(_LONGEST_S / total))))

    def _empty_cache(self) -> None:
        torch.sum(self._buffer, 0, out=self._sum)

    def _events(self, chain: Chain, sweeps: Sequence[int], steps: int) -> list[float]:
        found: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in chain]
        for _ in range(steps):
            value = None
            for index, link in enumerate(chain):
                for _ in range(sweeps[index]):
                    self._empty_cache()
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                value = link(value)
                end.record()
                found[index].append((begin, end))
        torch.cuda.synchronize()
        return [statistics.mean(begin.elapsed_time(end) for begin, end in pairs) / 1e3 for pairs in found]
