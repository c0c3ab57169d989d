"""How a function on fixed buffers is recorded, to run again without its host code."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

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


class Recordings:
    """Records for one user, by a recorder of its own: None for CUDA graphs, from `begin` on. told: why something was
    not recorded.
    """

    def __init__(self, recorder: Recorder | None = None) -> None:
        self.recorder = recorder
        self.told: list[str] = []

    def begin(self, device: torch.device) -> Recorder:
        """The recorder; CUDA graphs on the device where none was given."""
        if self.recorder is None:
            self.recorder = CudaRecorder(device)
        return self.recorder

    def record(self, functions: Mapping[K, Callable[[], None]]) -> dict[K, Callable[[], None]]:
        """What runs each of them again: the recordings, or, where one cannot be recorded, the functions themselves
        from then on.
        """
        assert self.recorder is not None
        try:
            return {key: self.recorder.record(function) for key, function in functions.items()}
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            first: BaseException = error  # what ends a capture that has failed raises, too
            while first.__context__ is not None:
                first = first.__context__
            self.tell(f"nothing is recorded, the host launches each operation: {str(first).splitlines()[0]}")
            self.recorder = Unrecorded()
            return dict(functions)

    def tell(self, what: str) -> None:
        """In the log, once."""
        if what not in self.told:
            self.told.append(what)
            log.warning("cuda_graphs: %s", what)
