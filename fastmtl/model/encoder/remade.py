"""`recompute: cheap`: results of a forward that backward makes again from what is kept for it anyway."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor


class Remade:
    """Inside `with remade.saving():` autograd keeps neither what was offered nor a view of it.

    So it is for every operation that reads a result: torch's own, those of fastmtl_kernels, and the linear layer that
    DeepSpeed puts in torch's place for ZeRO 3. A result is made again for the first of its readers in backward, and
    dropped when the last has it.
    """

    def __init__(self) -> None:
        # By storage, as autograd hands over other tensors of the same memory.
        self._results: WeakKeyDictionary[torch.UntypedStorage, _Result] = WeakKeyDictionary()

    def register(self, result: Tensor, make: Callable[[], Tensor]) -> None:
        """make() gives the result, which is contiguous and a storage of its own, once more with the same bits."""
        self._results[result.untyped_storage()] = _Result(make)

    def saving(self) -> AbstractContextManager[Any]:
        return torch.autograd.graph.saved_tensors_hooks(self._save, _restore)

    def _save(self, tensor: Tensor) -> Tensor | _View:
        result = self._results.get(tensor.untyped_storage())
        if result is None:
            # A parameter has to come back itself, as ZeRO 3 gives it its memory back by then; a result that its own
            # backward reads would keep itself alive.
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
