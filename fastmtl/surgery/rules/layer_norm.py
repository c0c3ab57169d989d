"""LayerNorm with one gradient per task.

    Y = H W + b,  H = (X - mean(X)) rstd
    dW_t = sum of dY H over the rows of t,  db_t = sum of dY over the rows of t

Shapes: X, Y, dY [N, d]; W, b [d]; d may be several dimensions. Sums in float32, or float64.
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


def layer_norm(
    x: Tensor,
    weight: nn.Parameter | None,
    bias: nn.Parameter | None,
    eps: float,
    segments: Segments,
    task_grads: Sink | None = None,
    known: Known | None = None,
) -> Tensor:
    """Normalize the rows of x [N, d] as torch.nn.functional.layer_norm does; return [N, d].

    weight, bias: [d], or None as in torch.nn.LayerNorm(elementwise_affine=False) and
    LayerNorm(bias=False).
    known: as in functional.linear.
    Raises UserError for an x of other dimensions, or with fewer rows than the segments have.
    """
    if weight is None or task_grads is None or not task_grads.active:
        return F.layer_norm(x, x.shape[1:], weight, bias, eps)
    check_rows("layer_norm", x, 1 + weight.dim(), segments)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(weight.dtype)
    return _LayerNorm.apply(x, weight, bias, known or (weight, bias), eps, segments, task_grads)


def layer_norm_rule(module: nn.LayerNorm, rows: Rows, sink: Sink, x: Tensor) -> Tensor:
    """Run an nn.LayerNorm on x [..., *normalized_shape]; return a tensor of the same shape."""
    flat, known = x.flatten(0, -1 - len(module.normalized_shape)), known_to(rows, module, "weight", "bias")
    segments = rows.segments(len(flat))
    return layer_norm(flat, module.weight, module.bias, module.eps, segments, sink, known).view_as(x)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        known: Known,
        eps: float,
        segments: Segments,
        task_grads: Sink,
    ) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.parameters = known
        ctx.segments, ctx.task_grads = segments, task_grads
        task_grads.expect(*known)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *gathered, mean, rstd = ctx.saved_tensors
        sink, segments, (weight, bias) = ctx.task_grads, ctx.segments, ctx.parameters
        shape, backward = gathered[0].shape, torch.ops.aten.native_layer_norm_backward
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx, _, _ = backward(dy, x, shape, mean, rstd, *gathered, [True, False, False])
        if any(ctx.needs_input_grad[1:3]):
            dy = segments.sort(dy)
        if ctx.needs_input_grad[1]:
            x, mean, rstd = segments.sort(x), segments.sort(mean), segments.sort(rstd)

            def product(dy: Tensor, rows: slice) -> Tensor:
                return backward(dy[rows], x[rows], shape, mean[rows], rstd[rows], *gathered, [False, True, False])[1]

            dw = sink.products(weight, dy, product, segments)
        if bias is not None and ctx.needs_input_grad[2]:
            wide = torch.promote_types(dy.dtype, torch.float32)
            db = sink.products(bias, dy, lambda dy, rows: dy[rows].sum(0, dtype=wide), segments)
        return dx, dw, db, None, None, None, None
