"""How a function on fixed buffers is recorded, to run again without its host code."""

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
    def warm_up(self, function: Callable[[], None]) -> None:
        """Runs it, so that whatever is made or compiled at the first call is there."""

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """What runs it again, reading and writing the same memory. It may have run meanwhile or not; what was there
        before it is left as it was.
        """


class CudaRecorder:
    """CUDA graphs in one memory pool, so at most one recorded forward may wait for its backward."""

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
            # Where ending a broken capture raises, torch leaves its stream the current one, and its pool open, for
            # which the allocator would keep every block that another stream has used.
            torch.cuda.set_stream(before)
            with suppress(RuntimeError):  # it is closed already
                torch._C._cuda_endAllocateToPool(before.device_index, self._pool)
            graph.reset()
            _failed.append(graph)
            self._free_generator()
            raise
        return graph.replay

    def _capture(self, graph: torch.cuda.CUDAGraph, function: Callable[[], object], pool: Any = None) -> None:
        # Not "global": another thread copies the next batches to the device meanwhile.
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            function()

    def _free_generator(self) -> None:
        """Take the device's random generator out of the state in which a failed capture leaves it: capture anew.

        In torch 2.11 CUDAGraph::capture_begin (aten/src/ATen/cuda/CUDAGraph.cpp) calls capture_prologue of the
        device's default generator (CUDAGeneratorImpl.cpp), which sets CUDAGeneratorState::capturing_. Only
        capture_epilogue clears this flag. CUDAGraph::capture_end calls it after cudaStreamEndCapture, and the error of
        a broken capture is raised in between; CUDAGraph::reset leaves the flag. While it is set,
        CUDAGeneratorState::increase raises for every random number outside of a capture. A capture that succeeds on the
        device sets and clears the flag and draws no number. Success on the same stream also shows that this stream can
        be used again. torch 2.13 needs no help: a generator has a state for each capture, which reset removes.
        """
        number = torch.zeros(1, device=self._device)  # torch warns of an empty graph
        self._capture(torch.cuda.CUDAGraph(), number.zero_)


# Graphs whose capture failed. The allocator of pinned memory keeps a reference to each and cannot be told to drop it
# (CUDAGraph::capture_begin, begin_allocate_to_pool), so that a graph that is gone would be asked for its streams.
_failed: list[torch.cuda.CUDAGraph] = []


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for everything recorded on a device: autograd runs a backward on the stream of its forward, and torch gives
    out streams a second time after 32.
    """
    return torch.cuda.Stream(device)


class Unrecorded:
    """Runs the function itself: the same operations, each launched by the host."""

    def warm_up(self, function: Callable[[], None]) -> None:
        function()

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        return function


class Turn:
    """A recorded forward and its backward, which have the recordings' memory to themselves."""

    def __init__(self) -> None:
        self._done = False

    @property
    def waits(self) -> bool:
        """Whether the backward is still to come."""
        return not self._done

    def end(self) -> None:
        """At the beginning of the backward. Raises RuntimeError for a second one."""
        if self._done:
            raise RuntimeError(
                "cuda_graphs: a recorded forward allows one backward, which overwrites its saved results; for one "
                "backward per task, turn cuda_graphs off or pass task_grads to the model"
            )
        self._done = True


class Recordings:
    """Records for one user, by a recorder of its own: None for CUDA graphs, from `begin` on. told: why something was
    not recorded.
    """

    def __init__(self, recorder: Recorder | None = None) -> None:
        self.recorder = recorder
        self.warned: list[str] = []
        self._turn: ref[Turn] | None = None

    def take(self, turn: Turn) -> None:
        """From a forward on."""
        self._turn = ref(turn)

    @property
    def taken(self) -> bool:
        """Whether a forward waits for its backward, and somebody can still ask for it."""
        turn = None if self._turn is None else self._turn()
        return turn is not None and turn.waits

    def begin(self, device: torch.device) -> None:
        """Before recordings that take the place of all there were: CUDA graphs on the device if none was given."""
        if self.recorder is None or isinstance(self.recorder, CudaRecorder):
            self.recorder = CudaRecorder(device)  # a pool whose graphs are gone is not to be used again

    def record(
        self, functions: Mapping[K, Callable[[], None]], warm_ups: Sequence[Callable[[], None]]
    ) -> dict[K, Callable[[], None]]:
        """What runs each of them again: the recordings, or, where one cannot be recorded, the functions themselves
        from then on. warm_ups: run before, so that nothing is recorded the first time it runs.
        """
        assert self.recorder is not None
        try:
            for warm_up in warm_ups:
                self.recorder.warm_up(warm_up)
            return {key: self.recorder.record(function) for key, function in functions.items()}
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            first: BaseException = error  # what ends a capture that has failed raises, too
            while first.__context__ is not None:
                first = first.__context__
            self.warn_once(f"recording failed, each operation is launched separately: {str(first).splitlines()[0]}")
            self.recorder = Unrecorded()
            return dict(functions)

    def warn_once(self, what: str) -> None:
        """In the log, once."""
        if what not in self.warned:
            self.warned.append(what)
            log.warning("cuda_graphs: %s", what)
