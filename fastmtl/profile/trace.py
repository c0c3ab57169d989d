"""A torch.profiler trace of a few steps, and the time of each part of a step."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from fastmtl.data.packed_batch import PackedBatch
from fastmtl.data.prefetch import ahead
from fastmtl.data.stream import BatchStream
from fastmtl.measure import ranges
from fastmtl.profile.steps import Steps

STEPS = 3
REST = "the rest"


class Clock:
    """A listener that sums the seconds of each range, without the ranges nested in it."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._open: list[ranges.Name] = []
        self._last: float | None = None
        self.seconds: dict[str, float] = dict.fromkeys([*ranges.NAMES, REST], 0.0)

    def on_range(self, name: ranges.Name, begins: bool) -> None:
        self.lap()
        if begins:
            self._open.append(name)
        else:
            self._open.pop()

    def lap(self) -> None:
        """Add the time since the last call to the innermost range.

        The clock waits for a GPU first, so work counts for the range that launched it.
        """
        self._steps.wait()
        now = time.perf_counter()
        if self._last is not None:
            self.seconds[self._open[-1] if self._open else REST] += now - self._last
        self._last = now


def trace(steps: Steps, stream: BatchStream, file: Path, device: torch.device, prefetch: int) -> dict[str, Any]:
    """Write a Chrome trace (.json.gz) of STEPS steps; on a GPU, also a memory snapshot.

    prefetch: as in a recipe. This many steps run before the clock starts, since their batches were
    made in advance. seconds in the result: mean seconds of each part of a step, measured in STEPS
    steps without the profiler. On a GPU each part waits for the previous one there, so nothing
    overlaps.
    """
    clock = Clock(steps)
    with ahead(_endless(stream), prefetch, device) as batches:
        next(batches)  # the first batch includes the epoch's shuffle
        for micro_batches in itertools.islice(batches, prefetch):
            steps.step(micro_batches)
        with ranges.listening(clock.on_range):
            clock.lap()
            for micro_batches in ranges.profile_iter("data", itertools.islice(batches, STEPS)):
                steps.step(micro_batches)
            clock.lap()
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with ahead(_endless(stream), prefetch, device) as batches:
        first = next(batches)
        with profile(activities=activities) as profiler:
            for micro_batches in ranges.profile_iter("data", itertools.islice(batches, STEPS)):
                steps.step(micro_batches)
            steps.wait()
    profiler.export_chrome_trace(str(file))
    found = {"file": str(file), "seconds": {name: value / STEPS for name, value in clock.seconds.items()}}
    if on_gpu:
        snapshot = file.with_name(file.name.replace(".json.gz", "-memory.pickle"))
        torch.cuda.memory._record_memory_history()
        steps.step(first)
        torch.cuda.memory._dump_snapshot(str(snapshot))
        torch.cuda.memory._record_memory_history(enabled=None)
        found["memory_snapshot"] = str(snapshot)
    return found


def _endless(stream: BatchStream) -> Iterator[list[PackedBatch]]:
    """Yield the steps of the first epoch again and again."""
    return itertools.chain.from_iterable(stream.epoch(0) for _ in itertools.count())
