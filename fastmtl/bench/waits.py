"""Search on the CPU for the calls that would make the host wait for a GPU.

On a GPU the host runs ahead of the device until it needs a number from it. A CPU never waits, but
the calls are the same. Three kinds of calls wait: reads of a number (`item`, `tolist`, `bool`,
`cpu`, ...), operators whose result has a size that only the device knows (`nonzero`, `unique`, a
mask as an index), and copies from host memory that are not `non_blocking`.

Here every tensor is on the CPU. So this module tracks the tensors that would be in host memory
beside a GPU: those made without a device (`torch.tensor(numbers)`), copied by `cpu()`, or computed
from such tensors alone. All other tensors would be on the GPU.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_READS = ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "is_nonzero", "equal", "allclose")
_TO_HOST = ("cpu",)
_FACTORIES = ("tensor", "as_tensor", "zeros", "ones", "empty", "full", "arange", "eye", "randperm", "randint")
# Reads in these files do not count, since they read host tensors if the model is on a GPU. Then the
# kernels of attention and pooling read the bounds of sequences on the device
# (tests/cuda_graphs/test_on_meta.py checks this), and a recording gets a plan that was made on the
# CPU.
_OF_THE_HOST = ("varlen_attention/api.py", "pool/api.py", "buffers/batch.py")
_SIZED_BY_DATA = ("nonzero", "_unique2", "unique_dim", "unique_consecutive", "masked_select", "_local_scalar_dense")


def host_waits(step: Callable[[], object]) -> list[str]:
    """Return one line for each time the host would wait for a GPU in a step.

    A line has the call, and the lines of code that made it.
    """
    waits: list[str] = []
    account = _Account(waits)
    from_numpy = torch.from_numpy  # the two modes below do not intercept this function

    def kept_from_numpy(array: np.ndarray) -> Tensor:
        tensor = from_numpy(array)
        account.keep(tensor)
        return tensor

    with _Functions(account), _Operators(account), mock.patch.object(torch, "from_numpy", kept_from_numpy):
        step()
    return waits


class _Account:
    """The tensors that would be in host memory, by id, and the waits found.

    The tensors are kept alive, so that no other tensor gets the same id.
    """

    def __init__(self, waits: list[str]) -> None:
        self._waits = waits
        self._on_host: dict[int, Tensor] = {}
        self.inside = False  # True inside a call that is handled already

    def wait(self, what: str) -> None:
        places = _places()
        if not places[0].startswith(_OF_THE_HOST):
            self._waits.append(f"{what}: {' < '.join(places)}")

    def is_host(self, tensor: Tensor) -> bool:
        return id(tensor) in self._on_host

    def keep(self, result: Any) -> None:
        self._on_host.update({id(found): found for found in _tensors(result)})


class _Functions(TorchFunctionMode):
    """A mode that intercepts calls of torch's functions from Python."""

    def __init__(self, account: _Account) -> None:
        super().__init__()
        self._account = account

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        account = self._account
        if account.inside:
            return func(*args, **kwargs)
        name = (resolve_name(func) or getattr(func, "__name__", "")).rpartition(".")[2]
        given = _tensors((args, kwargs))
        host = all(map(account.is_host, given))
        if name in (*_READS, *_TO_HOST) and given and not host:
            account.wait(name)
            result = self._quietly(func, args, kwargs)
            account.keep(result)
            return result
        if name == "to" and given and account.is_host(given[0]):
            to_device = any(isinstance(value, torch.device) for value in (*args, *kwargs.values()))
            if to_device and not kwargs.get("non_blocking"):
                account.wait("a copy to the device")
            result = self._quietly(func, args, kwargs)
            # `to` returns the same tensor here, but a new one if the device is a GPU.
            return result.clone() if to_device and result is given[0] else result
        if (
            name == "copy_"
            and not account.is_host(args[0])
            and isinstance(args[1], Tensor)
            and account.is_host(args[1])
        ):
            if not (kwargs.get("non_blocking") or len(args) > 2 and args[2]):
                account.wait("a copy to the device")
            return self._quietly(func, args, kwargs)
        if name in _FACTORIES and not given:
            result = self._quietly(func, args, kwargs)
            device = kwargs.get("device")
            if device is None:
                account.keep(result)
            elif name in ("tensor", "as_tensor"):
                account.wait(f"{name} of numbers on a device")
            return result
        result = func(*args, **kwargs)
        if given and host:
            account.keep(result)
        return result

    def _quietly(self, func: Any, args: Any, kwargs: Any) -> Any:
        self._account.inside = True
        try:
            return func(*args, **kwargs)
        finally:
            self._account.inside = False


class _Operators(TorchDispatchMode):
    """A mode that intercepts all operators, also those that torch itself calls, as in autograd."""

    def __init__(self, account: _Account) -> None:
        super().__init__()
        self._account = account

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        account = self._account
        if not account.inside:
            name = func._schema.name.removeprefix("aten::")
            given = _tensors((args, kwargs))
            masked = name.startswith("index") and any(tensor.dtype == torch.bool for tensor in _tensors(args[1:2]))
            counted = name == "repeat_interleave" and kwargs.get("output_size") is None
            if (name in _SIZED_BY_DATA or masked or counted) and not account.is_host(given[0]):
                account.wait(f"aten::{name}")
        return func(*args, **kwargs)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _places() -> list[str]:
    """Return the innermost three frames outside torch and this module, as `folder/file:line`."""
    frames = [
        frame
        for frame in traceback.extract_stack()
        if "/torch/" not in frame.filename and Path(frame.filename).name != Path(__file__).name
    ]
    return [f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno}" for frame in frames[:-4:-1]]
