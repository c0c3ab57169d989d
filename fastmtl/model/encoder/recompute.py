"""`recompute: cheap`: backward computes cheap results again instead of keeping them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor


class RecomputedResults:
    """Results that autograd does not keep inside `with results.saving():`, nor any view of them.

    This holds for every operation that reads a result: torch's own, those of fastmtl_kernels, and
    the linear layer that DeepSpeed puts in the place of torch's for ZeRO 3. Backward computes a
    result again for its first reader and drops it after the last one.
    """

    def __init__(self) -> None:
        # By storage: autograd saves other tensor objects of the same memory.
        self._results: WeakKeyDictionary[torch.UntypedStorage, _Result] = WeakKeyDictionary()

    def register(self, result: Tensor, make: Callable[[], Tensor]) -> None:
        """Register a contiguous result that has a storage of its own.

        make: computes the result again, bit for bit.
        """
        self._results[result.untyped_storage()] = _Result(make)

    def saving(self) -> AbstractContextManager[Any]:
        return torch.autograd.graph.saved_tensors_hooks(self._save, _restore)

    def _save(self, tensor: Tensor) -> Tensor | _View:
        result = self._results.get(tensor.untyped_storage())
        if result is None:
            # A parameter is saved as itself: by the time of the backward ZeRO 3 has given its
            # memory back to that object. A result that its own backward reads is saved detached:
            # otherwise it would keep itself alive.
            return tensor if tensor.is_leaf else tensor.detach()
        result.readers += 1
        return _View(result, tensor.shape, tensor.stride(), int(tensor.storage_offset()))


class _Result:
    def __init__(self, make: Callable[[], Tensor]) -> None:
        self.readers = 0
        self._make = make
        self._made: Tensor | None = None
        self._left = 0

    def read(self) -> Tensor:
        if self._made is None:
            with torch.no_grad():
                self._made = self._make()
            self._left = self.readers
        made = self._made
        self._left -= 1
        if self._left == 0:
            self._made = None
        return made


class _View(NamedTuple):
    result: _Result
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


def _restore(saved: Tensor | _View) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    return saved.result.read().as_strided(saved.shape, saved.stride, saved.offset)
