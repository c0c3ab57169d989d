"""Several Linears with one input, whose outputs lie side by side.

    Y[:, i] = X W_i^T + b_i                      dX = dY [W_1; ...; W_k]
    as one product X [W_1; ...; W_k]^T           [dW_1; ...; dW_k] = dY^T X

Shapes: X [N, in], W_i [out, in], b_i [out], Y and dY [N, k, out]. Weights that are adjacent in one
storage, as in the flat buffers of DeepSpeed, already form such a matrix. Other weights are copied
into one, k in x out numbers; a copy of the outputs would be N k out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastmtl.surgery.rules.rows import check_rows
from fastmtl.surgery.segments import Segments
from fastmtl.surgery.sinks.sink import Sink
from fastmtl_kernels.cast import cast


def projections(
    x: Tensor,
    weights: Sequence[nn.Parameter],
    biases: Sequence[nn.Parameter],
    segments: Segments,
    task_grads: Sink | None = None,
    terms: Mapping[int, Tensor] | None = None,
) -> Tensor:
    """Apply k Linears to x [N, in] and return their outputs side by side, [N, k, out].

    weights: k tensors [out, in]. biases: k tensors [out]. terms: {number of a Linear: term [N, out]
    to add to its output}; autograd's addition to a slice would copy all of dY.
    Task gradients are taken as in functional.linear. Raises UserError for an x of other dimensions,
    or with fewer rows than the segments have.
    """
    if task_grads is not None and not task_grads.active:
        task_grads = None
    if task_grads is not None:
        check_rows("projections", x, 2, segments)
    if torch.is_autocast_enabled(x.device.type):  # backward needs x in the dtype of the product
        x = x.to(torch.get_autocast_dtype(x.device.type))
    terms = terms or {}
    return _Projections.apply(x, segments, task_grads, tuple(terms), *weights, *biases, *terms.values())


class _Projections(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, segments: Segments, task_grads: Sink | None, columns: tuple[int, ...], *inputs: Any
    ) -> Tensor:
        parameters, terms = inputs[: len(inputs) - len(columns)], inputs[len(inputs) - len(columns) :]
        number = len(parameters) // 2
        weights, biases = parameters[:number], parameters[number:]
        # As in linear.py: ZeRO 3 gathers the weights again, and the sink finds parameters by id.
        ctx.save_for_backward(x if any(ctx.needs_input_grad[4 : 4 + len(parameters)]) else None, *weights)
        ctx.parameters, ctx.columns = parameters, columns
        ctx.segments, ctx.task_grads = segments, task_grads
        if task_grads is not None:
            for pair in zip(weights, biases, strict=True):
                task_grads.expect(*pair)
        y = F.linear(x, _stacked(weights), _stacked(biases)).view(len(x), number, len(biases[0]))
        for column, term in zip(columns, terms, strict=True):
            y[:, column] += term
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *gathered = ctx.saved_tensors
        rows = dy.flatten(1)
        dx = rows.mm(cast(_stacked(gathered), dy.dtype)) if ctx.needs_input_grad[0] else None
        return dx, None, None, None, *_gradients(ctx, rows, x), *(dy[:, column] for column in ctx.columns)


def _gradients(ctx: Any, rows: Tensor, x: Tensor) -> list[Tensor | None]:
    """Return autograd's gradients of k weights, then k biases. rows [N, k out]: dY flattened."""
    sink, parameters = ctx.task_grads, ctx.parameters
    needed = ctx.needs_input_grad[4 : 4 + len(parameters)]
    if not any(needed):
        return [None] * len(parameters)
    number = len(parameters) // 2
    if sink is not None:
        rows, x = ctx.segments.sort(rows), ctx.segments.sort(x)
        return sink.linears(parameters[:number], parameters[number:], rows, x, ctx.segments, needed)
    gradients = [*rows.t().mm(x).chunk(number), *rows.sum(0).chunk(number)]
    return [gradient if wanted else None for gradient, wanted in zip(gradients, needed, strict=True)]


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """Return the parts one below the other: a view if they are adjacent in one storage, else a
    copy.
    """
    first, at = parts[0], parts[0].data_ptr()
    storage, adjacent = first.untyped_storage().data_ptr(), True
    for part in parts:
        adjacent = adjacent and part.data_ptr() == at and part.is_contiguous() and part.dtype == first.dtype
        adjacent = adjacent and part.untyped_storage().data_ptr() == storage
        at += part.nbytes
    if adjacent:
        return first.as_strided((len(parts) * len(first), *first.shape[1:]), first.stride())
    return torch.cat(list(parts))
