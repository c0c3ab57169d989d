"""Embedding with one gradient per task: the rows of each task's tokens.

Shapes: ids int64 [N], table [V, d], output and its gradient [N, d]. Ids that all B rows of a batch
have in common, such as positions, are [1, L] and looked up once; the output is [B, L, d].
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
    padding_idx: int | None = None,
) -> Tensor:
    """Return the rows `ids` int64 [N] of the table `weight` [V, d], [N, d], as F.embedding does.

    With an active sink, the output depends on the sink's `anchor`, so that a backward reaches every
    layer. known: as in functional.linear, for (weight,). padding_idx: the id whose table row gets
    no gradient.
    Raises UserError if `ids` has other dimensions, or fewer entries than the segments have rows.
    """
    if task_grads is None or not task_grads.active:
        return F.embedding(ids, weight, padding_idx)
    check_rows("embedding", ids, 1, segments)
    return _Embedding.apply(task_grads.anchor, ids, weight, known or (weight,), padding_idx, segments, task_grads)


def embedding_rule(module: nn.Embedding, rows: Rows, sink: Sink, ids: Tensor) -> Tensor:
    """Run an nn.Embedding on ids int64 [...] and return [..., d].

    Ids [1, ...] belong to all B rows of the batch; the result is then [B, ..., d], a view that
    repeats one row.
    """
    flat, known = ids.flatten(), known_to(rows, module, "weight")
    if len(ids) == 1 != rows.batch:
        segments = rows.segments(rows.batch)
        y = _OneRow.apply(sink.anchor, flat, module.weight, known, module.padding_idx, rows.batch, segments, sink)
        return y.view(rows.batch, *ids.shape[1:], y.shape[-1])
    segments = rows.segments(len(flat))
    y = embedding(flat, module.weight, segments, sink, known, module.padding_idx)  # type: ignore[arg-type]
    return y.view(*ids.shape, y.shape[-1])


def sums_over_tokens(module: nn.Embedding) -> bool:
    """Return True if the table's gradient is the plain sum over the tokens."""
    return module.max_norm is None and not module.scale_grad_by_freq and not module.sparse


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        ids: Tensor,
        weight: Tensor,
        known: Known,
        padding_idx: int | None,
        segments: Segments,
        task_grads: Sink,
    ) -> Tensor:
        _keep(ctx, ids, known, padding_idx, segments, task_grads)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        sink, segments = ctx.task_grads, ctx.segments
        table = None
        if ctx.needs_input_grad[2]:
            table = _deliver(ctx, segments.sort(ids), segments.sort(dy), segments.host, dy.dtype)
        return torch.zeros_like(sink.anchor), None, table, None, None, None, None


class _OneRow(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        ids: Tensor,
        weight: Tensor,
        known: Known,
        padding_idx: int | None,
        batch: int,
        segments: Segments,
        task_grads: Sink,
    ) -> Tensor:
        _keep(ctx, ids, known, padding_idx, segments, task_grads)
        return F.embedding(ids, weight).expand(batch, -1, -1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        sink, segments = ctx.task_grads, ctx.segments
        table = None
        if ctx.needs_input_grad[2]:
            dtype = torch.promote_types(dy.dtype, torch.float32)
            parts = [*segments.rows(), slice(segments.host[-1], None)]  # the last: rows of no task
            dy = segments.sort(dy)
            sums = [dy[part].sum(0, dtype=dtype) for part in parts]
            host = tuple(len(ids) * task for task in range(len(parts)))
            table = _deliver(ctx, ids.repeat(len(sums)), torch.cat(sums), host, dy.dtype)
        return torch.zeros_like(sink.anchor), None, table, None, None, None, None, None


def _keep(ctx: Any, ids: Tensor, known: Known, padding_idx: int | None, segments: Segments, task_grads: Sink) -> None:
    """Keep in `ctx` what backward needs, and count the use of the table."""
    ctx.save_for_backward(ids)
    ctx.parameters, ctx.padding_idx = known, padding_idx
    ctx.segments, ctx.task_grads = segments, task_grads
    task_grads.expect(*known)


def _deliver(ctx: Any, ids: Tensor, rows: Tensor, host: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """Deliver the gradients `rows` [n, d] of the table rows `ids` [n] to the sink.

    host: the tasks' offsets among the n. Returns the table's gradient for autograd in `dtype`, or
    None where autograd gets nothing.
    """
    if ctx.padding_idx is not None:
        rows = rows.masked_fill((ids == ctx.padding_idx).unsqueeze(1), 0)
    (table,) = ctx.parameters
    gradient = ctx.task_grads.deliver_rows(table, ids, rows, host)
    return None if gradient is None else gradient.to(dtype)
