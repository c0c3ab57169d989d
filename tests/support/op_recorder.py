"""A recorder for the CPU that replays operators like a CUDA graph replays kernels.

`record` runs a function once, logs every operator that reaches torch's dispatcher, and restores
memory that existed before: like a capture, it leaves no effect. The result calls those operators
again on the same tensors, and writes each result to its place. Like a replay, it runs no Python of
the function, so a number that the function read from the host is the recorded one. Memory that the
function allocated is filled with NaN in between. Operators with random numbers draw again at a
replay, from torch's generator, like a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal")
_ALLOCATES = ("aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty", "aten::new_empty_strided")


class HostRead(RuntimeError):
    """Raised if the recorded function waits for a number on the device."""


def tensors_of(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Log(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[tuple[int, Tensor]]]] = []
        self.made: dict[int, Tensor] = {}
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name in _READS:
            raise HostRead(name)
        given = tensors_of((args, kwargs))
        if func._schema.is_mutable:
            for tensor in given:
                if storage(tensor) not in self.made and storage(tensor) not in self.before:
                    whole = tensor.detach().as_strided((tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0)
                    self.before[storage(tensor)] = whole, whole.clone()
        result = func(*args, **kwargs)
        known = {storage(tensor) for tensor in given}
        fresh = [(k, found) for k, found in enumerate(tensors_of(result)) if storage(found) not in known]
        self.made.update({storage(found): found for _, found in fresh})
        if name not in _ALLOCATES and (fresh or func._schema.is_mutable):
            self.calls.append((func, args, kwargs, fresh))
        return result


class OpRecorder:
    """A recorder. recordings: the calls of each, in order. replayed: operators replayed so far."""

    def __init__(self) -> None:
        self.recordings: list[int] = []
        self.replayed = 0

    def warm_up(self, function: Callable[[], None]) -> None:
        function()

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        log, random = _Log(), torch.get_rng_state()
        with log:
            function()
        torch.set_rng_state(random)
        with torch.no_grad():
            for whole, values in log.before.values():
                whole.data.copy_(values)
            for tensor in log.made.values():
                if tensor.is_floating_point():
                    tensor.data.fill_(float("nan"))  # hidden from autograd, like a kernel's write
        self.recordings.append(len(log.calls))

        @torch.no_grad()
        def replay() -> None:
            for func, args, kwargs, fresh in log.calls:
                found = tensors_of(func(*args, **kwargs))
                for index, recorded in fresh:
                    recorded.copy_(found[index])
            self.replayed += len(log.calls)

        return replay
