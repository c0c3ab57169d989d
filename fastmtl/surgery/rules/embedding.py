"""Embedding with one gradient per task: the rows of each task's tokens.

Shapes: ids int64 [N], table [V, d], output and its gradient [N, d].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmtl.surgery.rules.rows import check_rows
from fastmtl.surgery.rules.rule import Known, Rows, known_to
from fastmtl.surgery.segments import Segments
from fastmtl.surgery.sinks.sink import Sink


def embedding(
    ids: Tensor,
    weight: nn.Parameter,
    segments: Segments,
    task_grads: Sink | None = None,
    known: Known | None = None,
) -> Tensor:
    """Return the rows `ids` int64 [N] of the table `weight` [V, d], [N, d], as F.embedding does.

    With an active sink, the output depends on the sink's `anchor`, so that a backward reaches every
    layer. known: as in functional.linear, for (weight,).
    Raises UserError if `ids` has other dimensions, or fewer entries than the segments have rows.
    """
    if task_grads is None or not task_grads.active:
        return F.embedding(ids, weight)
    check_rows("embedding", ids, 1, segments)
    return _Embedding.apply(task_grads.anchor, ids, weight, known or (weight,), segments, task_grads)


def embedding_rule(module: nn.Embedding, rows: Rows, sink: Sink, ids: Tensor) -> Tensor:
    """Run an nn.Embedding on ids int64 [...] and return [..., d]."""
    flat = ids.flatten()
    segments, known = rows.segments(len(flat)), known_to(rows, module, "weight")
    y = embedding(flat, module.weight, segments, sink, known)  # type: ignore[arg-type]
    return y.view(*ids.shape, -1)


def sums_over_tokens(module: nn.Embedding) -> bool:
    """Return True if the table's gradient is the plain sum over the tokens."""
    return (
        module.max_norm is None and not module.scale_grad_by_freq and not module.sparse and module.padding_idx is None
    )


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, ids: Tensor, weight: nn.Parameter, known: Known, segments: Segments, task_grads: Sink
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.parameters = known
        ctx.segments, ctx.task_grads = segments, task_grads
        task_grads.expect(*known)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        sink, segments, (known,) = ctx.task_grads, ctx.segments, ctx.parameters
        table = None
        if ctx.needs_input_grad[2]:
            table = sink.deliver_rows(known, segments.sort(ids), segments.sort(dy), segments.host)
        return torch.zeros_like(sink.anchor), None, None if table is None else table.to(dy.dtype), None, None, None
