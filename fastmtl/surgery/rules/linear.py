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
from fastmtl.surgery.segments import Segments
from fastmtl.surgery.sinks.sink import Sink
from fastmtl_kernels.cast import cast


def linear(
    x: Tensor,
    weight: nn.Parameter,
    bias: nn.Parameter | None,
    segments: Segments,
    task_grads: Sink | None = None,
) -> Tensor:
    """Return x [N, in] times the transpose of weight [out, in], plus bias [out]: [N, out].

    Raises UserError for an x of other dimensions, or with fewer rows than the segments have.
    """
    if task_grads is None or not task_grads.active:
        return F.linear(x, weight, bias)
    check_rows("linear", x, 2, segments)
    if torch.is_autocast_enabled(x.device.type):  # backward needs x in the dtype of the product
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _Linear.apply(x, weight, bias, segments, task_grads)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        segments: Segments,
        task_grads: Sink,
    ) -> Tensor:
        # The parameters themselves are saved: ZeRO 3 gathers their storage again for backward.
        ctx.save_for_backward(x, weight, bias)
        # The sink finds parameters by id; checkpointing replaces saved tensors by other objects.
        ctx.parameters = weight, bias
        ctx.segments, ctx.task_grads = segments, task_grads
        task_grads.expect(weight, bias)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gathered, _ = ctx.saved_tensors
        dx = dy.mm(cast(gathered, dy.dtype)) if ctx.needs_input_grad[0] else None
        dw, db = ctx.task_grads.linear(*ctx.parameters, dy, x, ctx.segments, ctx.needs_input_grad[1:3])
        return dx, dw, db, None, None
