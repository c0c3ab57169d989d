"""Time spent on a device; only reading the result waits for the device."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """Timer from its construction to `stop`. `seconds()` waits for a CUDA device to get there."""

    def __init__(self, device: torch.device) -> None:
        self._events = None
        if device.type == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self._events[0].record()
        self._begin = self._end = time.perf_counter()

    def stop(self) -> Stopwatch:
        if self._events is not None:
            self._events[1].record()
        self._end = time.perf_counter()
        return self

    def seconds(self) -> float:
        if self._events is None:
            return self._end - self._begin
        begin, end = self._events
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
