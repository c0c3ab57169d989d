"""Operators after which the host has to wait for the device, found without one."""

from __future__ import annotations

from typing import Any

import torch
from op_recorder import READS, tensors_of
from torch.utils._python_dispatch import TorchDispatchMode

# The size of what they return depends on numbers on the device.
_COUNTS = ("aten::_unique", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::masked_select")
_INDEXES = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")


class Waits(TorchDispatchMode):
    """found: names of those that were called inside the block, by this thread."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        counts = name in (*READS, *_COUNTS)
        # A mask as an index becomes the places where it is true.
        counts |= name in _INDEXES and any(each.dtype == torch.bool for each in tensors_of(args[1]))
        counts |= name == "aten::repeat_interleave" and kwargs.get("output_size") is None
        if counts:
            self.found.append(name)
        return func(*args, **kwargs)
