"""Time spent on a device, without waiting for it until it is asked for."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """From its making to `stop`. `seconds()` waits for a CUDA device to get that far."""

    def __init__(self, device: torch.device) -> None:
        self._events = None
        if device.type == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self._events[0].record()
        self._begun = self._ended = time.perf_counter()

    def stop(self) -> Stopwatch:
        if self._events is not None:
            self._events[1].record()
        self._ended = time.perf_counter()
        return self

    def seconds(self) -> float:
        if self._events is None:
            return self._ended - self._begun
        begun, ended = self._events
        ended.synchronize()
        return begun.elapsed_time(ended) / 1e3
