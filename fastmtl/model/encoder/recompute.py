"""The setting `recompute: cheap`: less memory for activations that are cheap to compute.

They are not kept from forward to backward; backward computes them again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor


class RecomputedResults:
    """Registered results, which autograd computes again in backward instead of keeping them.

    An operation inside `with results.saving():` that would save a registered result, or a view of
    it, for its backward saves only the way to compute it. This is true of every operation: torch's,
    those of fastmtl_kernels, and DeepSpeed's linear layer, which replaces torch's under ZeRO 3.
    In backward, the first operation that needs the result computes it. It is dropped after the last
    one.
    """

    def __init__(self) -> None:
        # The keys are storages, because autograd saves new tensor objects of the same memory.
        self._results: WeakKeyDictionary[torch.UntypedStorage, _Result] = WeakKeyDictionary()

    def register(self, result: Tensor, make: Callable[[], Tensor]) -> None:
        """Register a result. It is contiguous and its storage contains no other tensor.

        make: function that computes the result again, with the same bits.
        """
        self._results[result.untyped_storage()] = _Result(make)

    def saving(self) -> AbstractContextManager[Any]:
        return torch.autograd.graph.saved_tensors_hooks(self._save, _restore)

    def _save(self, tensor: Tensor) -> Tensor | _View:
        result = self._results.get(tensor.untyped_storage())
        if result is None:
            # A parameter is saved as the same object: under ZeRO 3 the object is empty in between,
            # and gets its values back before the backward. Other tensors are saved detached: an
            # operation whose backward reads its own result would otherwise keep itself alive.
            return tensor if tensor.is_leaf else tensor.detach()
        result.readers += 1
        return _View(result, tensor.shape, tensor.stride(), int(tensor.storage_offset()))


class _Result:
    """One registered result. `read` is called once per saved view of it, in backward."""

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
