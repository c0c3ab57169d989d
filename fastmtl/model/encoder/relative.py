"""Tables of relative positions, whose rows belong to no text.

While a sink takes gradients per task, a table has T copies, one for the texts of each task. The
layers that read it are then ordinary layers: copy t has the rows of task t, so that its gradient is
that of task t. With a LoRA of each task there are T copies as well.
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

    G is T if the context's layers compute something for each task, else 1. rows: on the CPU.
    """
    assert context.batch is not None
    groups = context.batch.num_tasks if context.by_task else 1
    host = tuple(len(rows) * group for group in range(groups + 1))
    segments = Segments(upload(torch.tensor(host, dtype=torch.int32), device), host)
    return upload(rows, device).repeat(groups), segments
