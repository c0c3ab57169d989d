"""DistributedDataParallel, whose own reduction surgery replaces."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from fastmtl.errors import UserError
from fastmtl.surgery.ranks.collectives import world_size


def without_reduction(model: Any) -> AbstractContextManager[None]:
    """Return the context for a forward of `model` whose gradients surgery sums over the ranks.

    It is `no_sync` for a DistributedDataParallel, which then prepares no reduction, and empty for
    another model. It is also empty for a static graph, which fails in `no_sync`, and for a model
    with buffers, which are not broadcast there. A reduction that was prepared does no harm, since
    surgery's backward calls no hook of DistributedDataParallel.

    Raises UserError for a model with only a part of the processes: surgery sums over all.
    """
    if not isinstance(model, DistributedDataParallel):
        return nullcontext()
    size = dist.get_world_size(model.process_group)
    if size != world_size():
        raise UserError(
            f"model: its DistributedDataParallel has a process group of {size} of {world_size()} processes, and "
            "surgery sums over all: make it with the default process group"
        )
    return nullcontext() if model.static_graph or model.will_sync_module_buffers() else model.no_sync()
