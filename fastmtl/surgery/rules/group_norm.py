"""GroupNorm with one gradient per task.

    Y = H W + b,  H = (X - mean) rstd  with mean and rstd of each row and group of channels
    dW_t = sum of dY H,  db_t = sum of dY, over the rows of t and all positions

Shapes: X, Y, dY [N, C, *positions]; W, b [C]. Sums in float32 or wider.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastmtl.surgery.rules.rule import Known, Rows, known_to
from fastmtl.surgery.segments import Segments
from fastmtl.surgery.sinks.sink import Sink
from fastmtl_kernels.cast import cast


def group_norm_rule(module: nn.GroupNorm, rows: Rows, sink: Sink, x: Tensor) -> Tensor:
    """Run an nn.GroupNorm on x [N, C, *positions]; return a tensor of the same shape."""
    known, segments = known_to(rows, module, "weight", "bias"), rows.segments(len(x))
    if torch.is_autocast_enabled(x.device.type) and x.device.type != "cpu":  # as F.group_norm
        x = x.to(module.weight.dtype)
    return _GroupNorm.apply(
        x.contiguous(), module.weight, module.bias, known, module.num_groups, module.eps, segments, sink
    )


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        known: Known,
        groups: int,
        eps: float,
        segments: Segments,
        sink: Sink,
    ) -> Tensor:
        sizes = len(x), x.shape[1], x.shape[2:].numel(), groups
        y, mean, rstd = torch.native_group_norm(x, weight, bias, *sizes, eps)
        ctx.save_for_backward(x, weight, mean, rstd)  # the parameter itself, as in linear.py
        ctx.parameters, ctx.sizes, ctx.segments, ctx.sink = known, sizes, segments, sink
        sink.expect(*known)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gathered, mean, rstd = ctx.saved_tensors
        sink, segments, (weight, bias) = ctx.sink, ctx.segments, ctx.parameters
        dtype = torch.promote_types(x.dtype, torch.float32)
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            backward, mask = torch.ops.aten.native_group_norm_backward, [True, False, False]
            dx, _, _ = backward(dy.contiguous(), x, mean, rstd, gathered, *ctx.sizes, mask)
        batch, channels, positions, groups = ctx.sizes
        dy = dy.reshape(batch, channels, positions)
        if ctx.needs_input_grad[1]:
            by_group = cast(x, dtype).view(batch, groups, channels // groups * positions)
            normalised = (by_group - mean.unsqueeze(2)).mul_(rstd.unsqueeze(2))
            per_row = normalised.view(dy.shape).mul_(dy).sum(2)
            dw = sink.products(weight, segments.sort(per_row), _sum, segments)
        if bias is not None and ctx.needs_input_grad[2]:
            db = sink.products(bias, segments.sort(dy.sum(2, dtype=dtype)), _sum, segments)
        return dx, dw, db, None, None, None, None, None


def _sum(per_row: Tensor, rows: slice) -> Tensor:
    """Return a task's gradient [C] from those of the rows [N, C]."""
    return per_row[rows].sum(0)
