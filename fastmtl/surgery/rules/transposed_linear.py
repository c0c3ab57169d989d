"""Linear whose weight is stored transposed, transformers' Conv1D, with one gradient per task.

    Y = X W + b              dW_t = X[rows of t]^T dY[rows of t],  db_t = sum of dY[rows of t]

Shapes: X [N, in], W [in, out], b [out], Y and dY [N, out].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastmtl.surgery.rules.rule import Known, Rows, known_to
from fastmtl.surgery.segments import Segments
from fastmtl.surgery.sinks.sink import Sink
from fastmtl_kernels.cast import cast


def transposed_linear_rule(module: nn.Module, rows: Rows, sink: Sink, x: Tensor) -> Tensor:
    """Run a Conv1D of transformers on x [..., in] and return [..., out]."""
    flat, known = x.flatten(0, -2), known_to(rows, module, "weight", "bias")
    if torch.is_autocast_enabled(x.device.type):  # backward needs x in the dtype of the product
        flat = flat.to(torch.get_autocast_dtype(x.device.type))
    y = _TransposedLinear.apply(flat, module.weight, module.bias, known, rows.segments(len(flat)), sink)
    return y.view(*x.shape[:-1], y.shape[-1])


class _TransposedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, known: Known, segments: Segments, sink: Sink
    ) -> Tensor:
        ctx.save_for_backward(x, weight)  # the parameter itself, as in linear.py
        ctx.parameters, ctx.segments, ctx.sink = known, segments, sink
        sink.expect(*known)
        return torch.addmm(bias, x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gathered = ctx.saved_tensors
        sink, segments, (weight, bias) = ctx.sink, ctx.segments, ctx.parameters
        dx = dy.mm(cast(gathered, dy.dtype).t()) if ctx.needs_input_grad[0] else None
        dw = db = None
        if any(ctx.needs_input_grad[1:3]):
            dy = segments.sort(dy)
        if ctx.needs_input_grad[1]:  # the weight's gradient of a Linear with input dY and output gradient X
            dw, _ = sink.linear(weight, None, segments.sort(x), dy, segments, (True, False))
        if ctx.needs_input_grad[2]:
            db = sink.products(bias, dy, lambda dy, rows: dy[rows].sum(0), segments)
        return dx, dw, db, None, None, None
