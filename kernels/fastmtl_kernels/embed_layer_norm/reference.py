"""Reference of a BERT's embeddings in plain torch: it defines the result and runs on any device.

    z = words[input_ids] + positions[position_ids] + types[token_type_ids]
    y = dropout(LayerNorm(z) * weight + bias)

ids int64 or int32 [N]; words [V, d], positions [M, d], types [K, d], weight and bias [d], any
floating dtypes; positions, types and bias may be None. Arithmetic in float32, in float64 where
words are float64; z and y [N, d] have words' dtype. LayerNorm, dropout and rows of no task are as
in fastmtl_kernels.add_layer_norm.reference. Gradients by autograd; a sink receives the gradient of
a table as ids and rows.

Source: Devlin et al., BERT, 2019.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastmtl_kernels.dropout.reference import dropout
from fastmtl_kernels.layer_norm.reference import layer_norm, zeros_like_tail
from fastmtl_kernels.task_sink import TaskRows, TaskSink, table_gradient


def embed_layer_norm(
    ids: tuple[Tensor, Tensor | None, Tensor | None],
    tables: tuple[Tensor, Tensor | None, Tensor | None],
    weight: Tensor,
    bias: Tensor | None,
    *,
    dropout_p: float,
    eps: float,
    seed: Tensor | None,
    tasks: TaskRows,
    task_grads: TaskSink | None,
) -> Tensor:
    """Return y [N, d].

    ids and tables are in the order word, position, type, None for a missing table; the other
    arguments are those of fastmtl_kernels.embed_layer_norm, checked.
    """
    dtype = torch.promote_types(tables[0].dtype, torch.float32)
    stop = tasks.host[-1]
    anchor = None if task_grads is None else task_grads.anchor
    z = sum(
        _TableRows.apply(anchor, index[:stop], table, dtype, tasks, task_grads)
        for index, table in zip(ids, tables, strict=True)
        if index is not None and table is not None
    )
    z = z.to(tables[0].dtype).to(dtype)
    y = dropout(layer_norm(z, weight, bias, eps, tasks, task_grads), dropout_p, seed)
    tail = y.new_empty(tasks.num_rows - stop, y.shape[1])
    return torch.cat([y, zeros_like_tail(tail, 0)]).to(tables[0].dtype)


class _TableRows(torch.autograd.Function):
    """Computes table[ids] in `dtype`; backward gives the gradient to the sink."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor | None,
        ids: Tensor,
        table: Tensor,
        dtype: torch.dtype,
        tasks: TaskRows,
        sink: TaskSink | None,
    ) -> Tensor:
        ctx.save_for_backward(ids, anchor)
        ctx.table, ctx.table_rows, ctx.tasks, ctx.sink = table, len(table), tasks, sink
        if sink is not None:
            sink.expect(table)
        return torch.nn.functional.embedding(ids, table).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, rows: Tensor) -> tuple[Tensor | None, ...]:
        ids, anchor = ctx.saved_tensors
        d_anchor = None if anchor is None else torch.zeros_like(anchor)
        d_table = None
        if ctx.needs_input_grad[2]:
            d_table = table_gradient(ctx.sink, ctx.table, ctx.table_rows, ids, rows, ctx.tasks)
        return d_anchor, None, d_table, None, None, None
