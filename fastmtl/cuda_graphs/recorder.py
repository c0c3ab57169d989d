"""Recorders of functions on fixed buffers. A recording runs again without the Python code."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import Any, Protocol, TypeVar
from weakref import ref

import torch

log = logging.getLogger(__name__)

K = TypeVar("K")


class Recorder(Protocol):
    """Object that records functions without arguments; CUDA graphs are one implementation."""

    def warm_up(self, function: Callable[[], None]) -> None:
        """Run the function before its recording: a first call compiles kernels and allocates."""

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Return a function that runs the same operations again on the same memory.

        `record` itself may run the function. The contents of memory that existed before stay.
        """


class CudaRecorder:
    """Recorder that captures CUDA graphs, all in one memory pool.

    The graphs overwrite one another's memory. A second forward may therefore be replayed only after
    the backward of the first one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, _stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, function: Callable[[], None]) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            function()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        before = torch.cuda.current_stream(self._device)
        try:
            self._capture(graph, function, pool=self._pool)
        except BaseException:
            # If the end of a broken capture raises, torch leaves its stream as the current one
            # and its pool open. For an open pool the allocator keeps every block that another
            # stream has used.
            torch.cuda.set_stream(before)
            with suppress(RuntimeError):  # the pool is closed already
                torch._C._cuda_endAllocateToPool(before.device_index, self._pool)
            graph.reset()
            _failed.append(graph)
            self._free_generator()
            raise
        return graph.replay

    def _capture(self, graph: torch.cuda.CUDAGraph, function: Callable[[], object], pool: Any = None) -> None:
        # The mode "global" would fail: another thread copies the next batches to the device
        # during the capture.
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            function()

    def _free_generator(self) -> None:
        """Reset the device's random generator after a failed capture, by capturing once more.

        In torch 2.11 CUDAGraph::capture_begin (aten/src/ATen/cuda/CUDAGraph.cpp) calls
        capture_prologue of the device's default generator (CUDAGeneratorImpl.cpp), which sets
        CUDAGeneratorState::capturing_. Only capture_epilogue clears this flag.
        CUDAGraph::capture_end calls it after cudaStreamEndCapture, and the error of a broken
        capture is raised in between; CUDAGraph::reset leaves the flag. While the flag is set,
        CUDAGeneratorState::increase raises for every random number outside of a capture. A capture
        that succeeds on the device sets and clears the flag and draws no number. Success on the
        same stream also shows that this stream can be used again. In torch 2.13 this call is
        not needed: there a generator has a state per capture, which CUDAGraph::reset removes.
        """
        number = torch.zeros(1, device=self._device)  # torch warns of an empty graph
        self._capture(torch.cuda.CUDAGraph(), number.zero_)


# Graphs whose capture failed. They must stay alive: the allocator of pinned memory refers to each
# (CUDAGraph::capture_begin, begin_allocate_to_pool) and later asks the graph for its streams.
_failed: list[torch.cuda.CUDAGraph] = []


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream for all captures on a device, always the same one.

    Autograd runs a backward on the stream of its forward, so both need one stream. A new
    `torch.cuda.Stream` would be any of the 32 streams that torch hands out in turn.
    """
    return torch.cuda.Stream(device)


class Unrecorded:
    """Recorder that only returns the function itself, which then runs each time as eager code."""

    def warm_up(self, function: Callable[[], None]) -> None:
        function()

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        return function


class Turn:
    """One replayed forward and its backward.

    Between the two no other forward of the same recordings can be replayed, since it would
    overwrite the results saved for this backward.
    """

    def __init__(self) -> None:
        self._done = False

    @property
    def waits(self) -> bool:
        """True from the forward until its backward begins."""
        return not self._done

    def begin_backward(self) -> None:
        """Note that the backward begins. Raises RuntimeError if it has run before.

        A second backward would read saved results that the first one has overwritten.
        """
        if self._done:
            raise RuntimeError(
                "cuda_graphs: a recorded forward allows one backward, which overwrites its saved results; for one "
                "backward per task, turn cuda_graphs off or pass task_grads to the model"
            )
        self._done = True


class Recordings:
    """State common to all recordings of one part of a step: the encoder, the heads or the merging.

    These recordings share memory, so that only one forward at a time can wait for its backward.
    recorder: makes the recordings; None for CUDA graphs, which `begin` creates.
    Attribute warned: the warnings so far, each with the reason why something is not recorded.
    """

    def __init__(self, recorder: Recorder | None = None) -> None:
        self.recorder = recorder
        self.warned: list[str] = []
        self._turn: ref[Turn] | None = None

    def take(self, turn: Turn) -> None:
        """Reserve the shared memory for a forward and its backward until the backward begins."""
        self._turn = ref(turn)

    @property
    def taken(self) -> bool:
        """True while a replayed forward waits for its backward, so that no other can be replayed.

        A forward whose result was dropped does not count.
        """
        turn = None if self._turn is None else self._turn()
        return turn is not None and turn.waits

    def begin(self, device: torch.device) -> None:
        """Prepare for new recordings, after the caller has dropped the old ones.

        device: of the new recordings, used by CUDA graphs.
        """
        if self.recorder is None or isinstance(self.recorder, CudaRecorder):
            self.recorder = CudaRecorder(device)  # a pool cannot be used again once its graphs are gone

    def record(
        self, functions: Mapping[K, Callable[[], None]], warm_ups: Sequence[Callable[[], None]]
    ) -> dict[K, Callable[[], None]]:
        """Record functions. If one cannot be recorded, warn and return the functions themselves.

        warm_ups: functions that run before, since the first run of a function cannot be recorded.
        Return {key: function that replays the recording}. Raises torch.OutOfMemoryError.
        """
        assert self.recorder is not None
        try:
            for warm_up in warm_ups:
                self.recorder.warm_up(warm_up)
            return {key: self.recorder.record(function) for key, function in functions.items()}
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            first: BaseException = error  # the end of a failed capture raises an error of its own
            while first.__context__ is not None:
                first = first.__context__
            self.warn_once(f"recording failed, each operation is launched separately: {str(first).splitlines()[0]}")
            self.recorder = Unrecorded()
            return dict(functions)

    def warn_once(self, what: str) -> None:
        """Log a warning and add it to `warned`, unless it was given before."""
        if what not in self.warned:
            self.warned.append(what)
            log.warning("cuda_graphs: %s", what)
