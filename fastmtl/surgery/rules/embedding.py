"""Embedding with one gradient per task: the rows of each task's tokens.

Shapes: ids int64 [N], table [V, d], output and its gradient [N, d].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmtl.surgery.rules.rows import check_rows
from fastmtl.surgery.segments import Segments
from fastmtl.surgery.sinks.sink import Sink


def embedding(ids: Tensor, weight: nn.Parameter, segments: Segments, task_grads: Sink | None = None) -> Tensor:
    """Return the rows `ids` int64 [N] of the table `weight` [V, d], [N, d], as F.embedding does.

    With an active sink, the output depends on the sink's `anchor`, so that a backward reaches every
    layer. Raises UserError if `ids` has other dimensions, or fewer entries than the segments have
    rows.
    """
    if task_grads is None or not task_grads.active:
        return F.embedding(ids, weight)
    check_rows("embedding", ids, 1, segments)
    return _Embedding.apply(task_grads.anchor, ids, weight, segments, task_grads)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, ids: Tensor, weight: nn.Parameter, segments: Segments, task_grads: Sink
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.parameter = weight
        ctx.segments, ctx.task_grads = segments, task_grads
        task_grads.expect(weight)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        sink = ctx.task_grads
        anchor = torch.zeros_like(sink.anchor)
        table = sink.deliver_rows(ctx.parameter, ids, dy, ctx.segments.host) if ctx.needs_input_grad[2] else None
        return anchor, None, None if table is None else table.to(dy.dtype), None, None
