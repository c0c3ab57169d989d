"""Linear with one gradient per task.

    Y = X W^T + b            dW_t = dY[rows of t]^T X[rows of t],  db_t = sum of dY[rows of t]

Shapes: X [N, in], W [out, in], b [out], Y and dY [N, out].
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
from fastmtl_kernels.cast import cast


def linear(
    x: Tensor,
    weight: nn.Parameter,
    bias: nn.Parameter | None,
    segments: Segments,
    task_grads: Sink | None = None,
    known: Known | None = None,
) -> Tensor:
    """Return x [N, in] times the transpose of weight [out, in], plus bias [out]: [N, out].

    known: the sink's parameters for (weight, bias); None if these are weight and bias themselves.
    Raises UserError for an x of other dimensions, or with fewer rows than the segments have.
    """
    if task_grads is None or not task_grads.active:
        return F.linear(x, weight, bias)
    check_rows("linear", x, 2, segments)
    if torch.is_autocast_enabled(x.device.type):  # backward needs x in the dtype of the product
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _Linear.apply(x, weight, bias, known or (weight, bias), segments, task_grads)


def linear_rule(module: nn.Linear, rows: Rows, sink: Sink, x: Tensor) -> Tensor:
    """Run an nn.Linear on x [..., in] and return [..., out]."""
    flat, known = x.flatten(0, -2), known_to(rows, module, "weight", "bias")
    y = linear(flat, module.weight, module.bias, rows.segments(len(flat)), sink, known)  # type: ignore[arg-type]
    return y.view(*x.shape[:-1], y.shape[-1])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        known: Known,
        segments: Segments,
        task_grads: Sink,
    ) -> Tensor:
        # The parameters themselves are saved: ZeRO 3 gathers their storage again for backward. A
        # frozen layer, such as one with a LoRA, needs no input.
        ctx.save_for_backward(x if any(ctx.needs_input_grad[1:3]) else None, weight, bias)
        # The sink finds parameters by id; checkpointing replaces saved tensors by other objects.
        ctx.parameters = known
        ctx.segments, ctx.task_grads = segments, task_grads
        task_grads.expect(*known)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gathered, _ = ctx.saved_tensors
        dx = dy.mm(cast(gathered, dy.dtype)) if ctx.needs_input_grad[0] else None
        segments, needed = ctx.segments, ctx.needs_input_grad[1:3]
        dw = db = None
        if any(needed):
            dw, db = ctx.task_grads.linear(*ctx.parameters, segments.sort(dy), segments.sort(x), segments, needed)
        return dx, dw, db, None, None, None
