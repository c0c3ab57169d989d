"""The embeddings of a BERT on packed rows: a sum of one to three tables' rows, LayerNorm, dropout.

    z = words[input_ids] + positions[position_ids] + types[token_type_ids]
    h = (z - mean(z)) rstd,  rstd = 1 / sqrt(var + eps)    y = dropout(h weight + bias)
    dh = keep dy / (1 - dropout_p)                         dz, dweight, dbias as in add_layer_norm
    gradient of row v of a table: the sum of dz's rows whose id is v

ids [N]; words [V, d], positions [M, d], types [K, d]; weight, bias [d]; y [N, d]. positions, types
and bias may be missing, as in models with rotary positions. keep is 0 for an
element that dropout drops, else 1. Statistics and sums are float32. z is kept for backward in
words' dtype; backward draws the dropout mask again. A sink receives the gradient of a table as ids
[N] and rows [N, d], so that no gradient of the size of T tables is needed here. An implementation
is a module with `forward` and `backward`. Equal inputs give equal bits. Not differentiable twice.

Source: see fastmtl_kernels.embed_layer_norm.reference.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastmtl_kernels.checks import check_columns, check_dropout, describe
from fastmtl_kernels.dispatch import RowImpl, select
from fastmtl_kernels.embed_layer_norm import cpp, reference
from fastmtl_kernels.layer_norm.common import RowNorm
from fastmtl_kernels.task_sink import (
    TaskRows,
    TaskSink,
    TokenOffsets,
    check_sink,
    common_dtype,
    gradient,
    table_gradient,
)


def embed_layer_norm(
    input_ids: Tensor,
    position_ids: Tensor | None,
    token_type_ids: Tensor | None,
    words: Tensor,
    positions: Tensor | None,
    types: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    dropout_p: float = 0.0,
    eps: float = 1e-12,
    seed: Tensor | None = None,
    token_offsets: TokenOffsets | None = None,
    task_grads: TaskSink | None = None,
    impl: RowImpl = "auto",
) -> Tensor:
    """Return dropout(LayerNorm(the sum of each token's table rows)).

    The rows are words[input_ids], positions[position_ids] and types[token_type_ids].

    Args:
        input_ids: [N], int64 or int32, rows of `words`. All three kinds of ids must be valid rows
            of their tables, also past the last token offset.
        position_ids: [N], int64 or int32, rows of `positions`; None without this table.
        token_type_ids: [N], int64 or int32, rows of `types`; None without this table.
        words: [V, d], floating point.
        positions: [M, d]; None for none.
        types: [K, d]; None for none.
        weight: [d], the factor of LayerNorm.
        bias: [d], the summand of LayerNorm; None for none.
        dropout_p: the probability of dropping an element of the result, in [0, 1).
        eps: added to the variance.
        seed: int64 of one element on the tables' device; needed if dropout_p > 0. Each call in a
            step needs its own seed, since equal seeds drop equal elements.
        token_offsets: the rows of each task, as in fastmtl_kernels.add_layer_norm. Rows past the
            last offset are zeros in y.
        task_grads: the sink, which receives the gradients of tables, weight and bias per task; its
            anchor becomes an input of the operation. None for autograd's usual dense gradients.
        impl: "auto", "reference", "triton" (CUDA tensors) or "cpp" (CPU tensors).

    Returns:
        y [N, d] of words' dtype.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device; the message names it.
        RuntimeError: the implementation is not available here; the message gives the reason.
    """
    _check(
        {"input_ids": input_ids, "position_ids": position_ids, "token_type_ids": token_type_ids},
        {"words": words, "positions": positions, "types": types},
    )
    check_columns(words, {"weight": weight} if bias is None else {"weight": weight, "bias": bias})
    check_dropout(dropout_p, seed, words.device)
    check_sink(token_offsets, task_grads)
    tasks = TaskRows.make(token_offsets, input_ids.shape[0], words.device)
    kernels = _kernels(select("embed_layer_norm", impl, words, positions, types, weight, bias))
    if kernels is None:
        return reference.embed_layer_norm(
            (input_ids, position_ids, token_type_ids), (words, positions, types), weight, bias, dropout_p=dropout_p,
            eps=eps, seed=seed, tasks=tasks, task_grads=task_grads,
        )  # fmt: skip
    saves, dtype = torch.is_grad_enabled(), common_dtype(weight, bias)
    call = RowNorm(kernels, dropout_p, eps, tasks, task_grads, saves, dtype)
    anchor = None if task_grads is None else task_grads.anchor
    used = seed if dropout_p > 0 else None
    return _EmbedLayerNorm.apply(
        anchor, input_ids, position_ids, token_type_ids, words, positions, types, weight, bias, used, call
    )


def _kernels(impl: str) -> ModuleType | None:
    """Return the module of an implementation, None for the reference."""
    match impl:
        case "cpp":
            return cpp
        case "triton":
            from fastmtl_kernels.embed_layer_norm import triton

            return triton
        case _:
            return None


class _EmbedLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor | None,
        input_ids: Tensor,
        position_ids: Tensor | None,
        token_type_ids: Tensor | None,
        words: Tensor,
        positions: Tensor | None,
        types: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        seed: Tensor | None,
        call: RowNorm,
    ) -> Tensor:
        ids = input_ids, position_ids, token_type_ids
        y, z, mean, rstd = call.kernels.forward(ids, (words, positions, types), weight, bias, seed, call)
        ctx.save_for_backward(*ids, z, mean, rstd, weight, seed, anchor)
        # A sink recognises a parameter as the same Python object, and with activation checkpointing
        # ctx.saved_tensors returns other objects.
        ctx.parameters = words, positions, types, weight, bias
        # ZeRO 3 changes the shapes before backward.
        ctx.table_rows = [0 if table is None else len(table) for table in ctx.parameters[:3]]
        ctx.call = call
        if call.sink is not None:
            call.sink.expect(*(parameter for parameter in ctx.parameters if parameter is not None))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *ids, z, mean, rstd, weight, seed, anchor = ctx.saved_tensors
        call, tables = ctx.call, ctx.parameters[:3]
        dz, sums = call.kernels.backward(dy, z, mean, rstd, weight, seed, call)
        d_tables = [
            table_gradient(call.sink, table, num, index, dz, call.tasks) if wanted else None
            for table, num, index, wanted in zip(tables, ctx.table_rows, ids, ctx.needs_input_grad[4:7], strict=True)
        ]
        d_weight, d_bias = (
            gradient(call.sink, parameter, sums[k]) if wanted else None
            for k, (parameter, wanted) in enumerate(zip(ctx.parameters[3:], ctx.needs_input_grad[7:9], strict=True))
        )
        d_anchor = None if anchor is None else torch.zeros_like(anchor)
        return d_anchor, None, None, None, *d_tables, d_weight, d_bias, None, None


def _check(ids: dict[str, Tensor | None], tables: dict[str, Tensor | None]) -> None:
    for (name, index), (of, table) in zip(list(ids.items())[1:], list(tables.items())[1:], strict=True):
        if (index is None) != (table is None):
            given, missing = (of, name) if index is None else (name, of)
            raise ValueError(f"{missing} must be given with {given}, got None")
    _check_given(
        {name: index for name, index in ids.items() if index is not None or name == "input_ids"},
        {name: table for name, table in tables.items() if table is not None or name == "words"},
    )


def _check_given(ids: dict[str, Any], tables: dict[str, Any]) -> None:
    words = tables["words"]
    for name, table in tables.items():
        if not isinstance(table, Tensor) or table.dim() != 2 or 0 in table.shape or not table.is_floating_point():
            raise ValueError(f"{name} must be floating point of shape [rows, d], got {describe(table)}")
        if table.shape[1] != words.shape[1]:
            raise ValueError(f"{name} must have {words.shape[1]} columns like words, got {describe(table)}")
        if table.device != words.device:
            raise ValueError(f"{name} must be on {words.device} like words, got {table.device}")
    for name, index in ids.items():
        if not isinstance(index, Tensor) or index.dim() != 1 or index.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"{name} must be int64 or int32 of shape [N], got {describe(index)}")
        if index.shape != ids["input_ids"].shape:
            raise ValueError(f"{name} must be as long as input_ids, {len(ids['input_ids'])}, got {describe(index)}")
        if index.device != words.device:
            raise ValueError(f"{name} must be on {words.device} like words, got {index.device}")
