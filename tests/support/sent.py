"""Arguments of collectives, seen below torch.distributed and DeepSpeed."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = {
    "allreduce_": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
}


class Sent(TorchDispatchMode):
    """A record of collectives.

    buffers: (kind, bytes of the whole buffer) of each collective inside the block, except
    broadcasts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("c10d::")
        if func.namespace == "c10d" and name in KINDS:
            buffers = [sum(leaf.nbytes for leaf in tree_leaves(one) if isinstance(leaf, torch.Tensor)) for one in args]
            self.buffers.append((KINDS[name], max(buffers)))
        return func(*args, **(kwargs or {}))

    def total(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for kind, nbytes in self.buffers:
            found[kind] = found.get(kind, 0) + nbytes
        return found
