"""DistributedDataParallel without its own reduction, which surgery replaces."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from fastmtl.errors import UserError
from fastmtl.surgery.ranks.collectives import world_size


def without_reduction(model: Any) -> AbstractContextManager[None]:
    """Return the context for a forward whose gradients surgery reduces; it does nothing to a model
    that is not a DistributedDataParallel.

    A forward of DistributedDataParallel prepares its reduction, and the next one fails if no
    backward through its hooks has followed. Surgery's backward calls no hook.

    Raises UserError for a model that reduces in a part of the processes: surgery uses all.
    """
    if not isinstance(model, DistributedDataParallel):
        return nullcontext()
    if dist.get_world_size(model.process_group) != world_size():
        raise UserError(
            f"model: its DistributedDataParallel has a process group of {dist.get_world_size(model.process_group)} of "
            f"{world_size()} processes, and surgery sums over all: make it with the default process group"
        )
    return model.no_sync()


@contextmanager
def explain_reduction() -> Iterator[None]:
    """Turn the error of a second forward outside `without_reduction` into a UserError."""
    try:
        yield
    except RuntimeError as error:
        if "Expected to have finished reduction" not in str(error):
            raise
        raise UserError(
            "DistributedDataParallel waits for a reduction of its own, and surgery has reduced the gradients in its "
            "place: call ddp.module(...), or ddp(...) inside `with ddp.no_sync():`"
        ) from None
