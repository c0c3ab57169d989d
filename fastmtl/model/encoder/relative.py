"""Tables of relative positions, whose rows belong to no text.

While a sink takes gradients per task, a table has T copies, one for the texts of each task. The
layers that read it are then ordinary layers: copy t has the rows of task t, so that its gradient is
that of task t.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from fastmtl.model.encoder.context import ForwardContext
from fastmtl.surgery.segments import Segments
from fastmtl_kernels.upload import upload


def longest(context: ForwardContext) -> int:
    """Return the number of tokens of the batch's longest text."""
    assert context.batch is not None
    return max((stop - start for start, stop in pairwise(context.batch.host.cu_seqlens)), default=0)


def copied(rows: Tensor, context: ForwardContext, device: torch.device) -> tuple[Tensor, Segments]:
    """Return rows [R] of a table as [G R] on `device`, and the segments of the copies.

    G is T while the context's sink takes gradients, else 1. rows: on the CPU.
    """
    assert context.batch is not None
    groups = 1 if context.armed is None else context.batch.num_tasks
    host = tuple(len(rows) * group for group in range(groups + 1))
    segments = Segments(upload(torch.tensor(host, dtype=torch.int32), device), host)
    return upload(rows, device).repeat(groups), segments
