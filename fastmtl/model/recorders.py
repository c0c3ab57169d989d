"""How a function on fixed buffers is recorded, to run again without its host code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from fastmtl_kernels import dispatch

# Compute capabilities on which grouped_mm, in bf16, does not read the offsets on the host (torch 2.11 and 2.13).
GROUPED_ON = (9, 10)


class Recorder(Protocol):
    def warm_up(self, function: Callable[[], None]) -> None:
        """Runs it, so that whatever is made or compiled at the first call is there."""

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """What runs it again, reading and writing the same memory. It may have run meanwhile or not; what was there
        before it is left as it was.
        """


class CudaRecorder:
    """CUDA graphs in one memory pool, so at most one recorded forward may wait for its backward."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        # One stream for all: autograd runs a backward on the stream of its forward.
        self._stream = torch.cuda.Stream(device)

    def warm_up(self, function: Callable[[], None]) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            function()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # Not "global": another thread copies the next batches to the device meanwhile.
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            function()
        return graph.replay


class Unrecorded:
    """Runs the function itself: the same operations, each launched by the host."""

    def warm_up(self, function: Callable[[], None]) -> None:
        function()

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        return function


def why_not(hidden: Tensor, head_dim: int, *, grouped: bool) -> str:
    """The reason why the layers of these hidden states cannot be recorded there, "" where they can.

    grouped: with products over tasks' rows.
    """
    device, dtype = hidden.device, hidden.dtype
    if device.type != "cuda":
        return f"CUDA graphs need an NVIDIA GPU, the model is on {device.type}"
    without = dispatch.why_not("triton", device, {dtype})
    if without:
        return without
    from fastmtl_kernels.varlen_attention_triton import MAX_HEAD_DIM

    if head_dim > MAX_HEAD_DIM[dtype]:
        return f"attention heads of {head_dim} columns in {dtype} have no kernel of their own"
    if grouped and dtype != torch.bfloat16:
        return f"products over tasks' rows need bf16, the model is in {dtype}"
    major, minor = torch.cuda.get_device_capability(device)
    if grouped and major not in GROUPED_ON:
        return f"products over tasks' rows need a GPU of sm_90 or sm_100, this one is sm_{major}{minor}"
    return ""
