"""Prefetching: while a step trains, a thread prepares the batches of the next steps.

The thread draws the rows, packs them, plans their attention and copies the batch to the device from
pinned memory. Processes are not needed: packing 8,192 tokens takes half a millisecond of numpy, and
a process would have to send each batch to the training process.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor


class Batch(Protocol):
    """The method that a batch needs for prefetching."""

    def to(self, device: torch.device) -> Any:
        """Return the batch on `device`. The host does not wait for the copies."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Any: ...


Kind = TypeVar("Kind", bound=Batch)


@contextmanager
def ahead(steps: Iterable[Sequence[Kind]], depth: int, device: torch.device) -> Iterator[Iterator[list[Kind]]]:
    """Provide an iterator over the steps: per step, the list of its micro-batches on `device`.

    A context manager; leaving its block ends the thread. The thread prepares up to `depth` steps
    before they are requested; with depth 0 there is no thread, and each step is prepared on
    request. If preparing a step raises an error, the iterator first returns the earlier steps and
    then raises that error. The caller must not read from `steps`, since the thread does.
    """
    if depth == 0:
        yield ([batch.to(device) for batch in step] for step in steps)
        return
    worker = _Worker(iter(steps), depth, device)
    try:
        yield worker.taken()
    finally:
        worker.close()


@dataclass(frozen=True)
class _Made(Generic[Kind]):
    """One prepared step. copied: a CUDA event after the copies to the device; None on CPUs."""

    batches: list[Kind]
    copied: torch.cuda.Event | None


class _Worker(Generic[Kind]):
    def __init__(self, steps: Iterator[Sequence[Kind]], depth: int, device: torch.device) -> None:
        self._steps, self._device = steps, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # Prepared steps in order. An exception is the error of a step; None marks the end.
        self._made: queue.SimpleQueue[_Made[Kind] | BaseException | None] = queue.SimpleQueue()
        self._room = threading.Semaphore(depth)
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="fastmtl-data", daemon=True)
        self._thread.start()

    def taken(self) -> Iterator[list[Kind]]:
        while True:
            made = self._made.get()
            if made is None:
                return
            if isinstance(made, BaseException):
                raise made
            self._room.release()
            if made.copied is not None:
                torch.cuda.current_stream(self._device).wait_event(made.copied)
                for batch in made.batches:
                    batch.map(_used_here)
            yield made.batches

    def close(self) -> None:
        self._closed = True
        self._room.release()
        self._thread.join()

    def _work(self) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # the current device is per thread
            while True:
                self._room.acquire()
                if self._closed:
                    return
                step = next(self._steps, None)
                if step is None:
                    break
                self._made.put(self._copy(step))
        except BaseException as error:  # noqa: BLE001 - raised again by `taken`
            self._made.put(error)
        else:
            self._made.put(None)

    def _copy(self, step: Sequence[Kind]) -> _Made[Kind]:
        if self._stream is None:
            return _Made([batch.to(self._device) for batch in step], None)
        with torch.cuda.stream(self._stream):
            return _Made([batch.to(self._device) for batch in step], self._stream.record_event())


def _used_here(tensor: Tensor) -> Tensor:
    """Return the tensor, after protecting its memory from reuse.

    The copying stream allocated the memory. Without record_stream the allocator could reuse it
    before the current stream has finished reading.
    """
    tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return tensor
