"""Captures that fail, without a GPU: a model of torch's source takes the place of torch.

The flag of the generator, the current stream and the pools change as in CUDAGraph.cpp and
CUDAGeneratorImpl.cpp of torch 2.11, where a capture that cannot end leaves all three unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import TracebackType
from typing import Any

import pytest
import torch

from fastmtl.cuda_graphs import recorder as recorders
from fastmtl.cuda_graphs.recorder import CudaRecorder, Recordings, Unrecorded

HOST = torch.device("cpu")


class Stream:
    device_index = 0


class Device:
    """captures: stream, pool and end of each. draw: draws a random number outside of a capture."""

    def __init__(self) -> None:
        self.default, self.side = Stream(), Stream()
        self.current = self.default
        self.capturing = self.broken = False
        self.open_pools: list[Any] = []
        self.captures: list[tuple[Stream, Any, str]] = []

    def draw(self) -> None:
        if self.capturing:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")

    def read(self) -> None:
        """Fail as `.item()` does while a stream captures."""
        self.broken = True
        raise RuntimeError("operation not permitted when stream is capturing")

    def end_allocation(self, device_index: int, pool: Any) -> None:
        if pool not in self.open_pools:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.open_pools.remove(pool)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()

    class CUDAGraph:
        def reset(self) -> None:
            pass

        def replay(self) -> None:
            pass

    class graph:  # noqa: N801
        def __init__(self, graph: CUDAGraph, pool: Any, stream: Stream, capture_error_mode: str) -> None:
            assert isinstance(graph, CUDAGraph) and capture_error_mode == "thread_local"
            self.pool, self.stream = pool, stream

        def __enter__(self) -> None:
            self.before, device.current = device.current, self.stream
            device.capturing = True
            device.open_pools.append(self.pool)

        def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
            if device.broken:
                device.broken = False
                device.captures.append((self.stream, self.pool, "broken"))
                raise RuntimeError("operation failed due to a previous error during capture")
            device.captures.append((self.stream, self.pool, "ended"))
            device.open_pools.remove(self.pool)
            device.capturing = False
            device.current = self.before

    def set_stream(stream: Stream) -> None:
        device.current = stream

    replacements: dict[str, Any] = {
        "CUDAGraph": CUDAGraph,
        "graph": graph,
        "graph_pool_handle": lambda: "pool",
        "current_stream": lambda _: device.current,
        "set_stream": set_stream,
        "device": lambda _: nullcontext(),
    }
    for name, value in replacements.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", device.end_allocation, raising=False)
    monkeypatch.setattr(recorders, "_stream", lambda _: device.side)
    monkeypatch.setattr(recorders, "_failed", [])
    return device


def fails_half_way(device: Device, calls: list[str]) -> Callable[[], None]:
    def function() -> None:
        calls.append("first half")
        device.read()
        calls.append("second half")

    return function


def test_a_broken_capture_is_followed_by_one_that_succeeds_on_the_same_stream(device: Device) -> None:
    calls: list[str] = []
    with pytest.raises(RuntimeError, match="previous error during capture") as caught:
        CudaRecorder(HOST).record(fails_half_way(device, calls))
    assert "not permitted" in str(caught.value.__context__)
    assert calls == ["first half"]
    assert device.captures == [(device.side, "pool", "broken"), (device.side, None, "ended")]
    assert device.current is device.default and device.open_pools == []
    device.draw()


@pytest.mark.parametrize("error", [KeyboardInterrupt, TypeError, torch.OutOfMemoryError])
def test_an_error_that_leaves_the_capture_whole_stays_what_it_is(error: type, device: Device) -> None:
    def function() -> None:
        raise error("mine")

    with pytest.raises(error, match="mine"):
        CudaRecorder(HOST).record(function)
    assert [end for _, _, end in device.captures] == ["ended", "ended"]
    assert device.current is device.default and device.open_pools == []
    device.draw()


def test_a_capture_that_succeeds_needs_no_second_one(device: Device) -> None:
    CudaRecorder(HOST).record(lambda: None)()
    assert device.captures == [(device.side, "pool", "ended")]


def test_the_operations_launched_instead_can_draw_random_numbers(device: Device) -> None:
    recordings = Recordings()
    recordings.begin(HOST)
    calls: list[str] = []
    found = recordings.record({"forward": fails_half_way(device, calls), "backward": device.draw}, [])
    assert isinstance(recordings.recorder, Unrecorded)
    assert recordings.warned == [
        "recording failed, each operation is launched separately: operation not permitted when stream is capturing"
    ]
    found["backward"]()
