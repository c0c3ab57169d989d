"""RMSNorm with one gradient per task.

    Y = H W,  H = X r,  r = (mean(X^2) + eps)^(-1/2)
    dX = r (G - H mean(G H)),  G = dY W              dW_t = sum of dY H over the rows of t

Shapes: X, Y, dY [N, d]; W [d]; r [N]; d may be several dimensions. Backward computes in float32 or
wider.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmtl.surgery.rules.rule import Known, Rows, known_to
from fastmtl.surgery.segments import Segments
from fastmtl.surgery.sinks.sink import Sink
from fastmtl_kernels.cast import cast


def rms_norm_rule(module: nn.RMSNorm, rows: Rows, sink: Sink, x: Tensor) -> Tensor:
    """Run an nn.RMSNorm on x [..., *normalized_shape]; return a tensor of the same shape."""
    flat, known = x.flatten(0, -1 - len(module.normalized_shape)), known_to(rows, module, "weight")
    return _RMSNorm.apply(flat, module.weight, known, module.eps, rows.segments(len(flat)), sink).view_as(x)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, known: Known, eps: float | None, segments: Segments, sink: Sink
    ) -> Tensor:
        ctx.save_for_backward(x, weight)  # the parameter itself, as in linear.py
        ctx.parameters, ctx.eps, ctx.segments, ctx.sink = known, eps, segments, sink
        sink.expect(*known)
        return F.rms_norm(x, weight.shape, weight, eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gathered = ctx.saved_tensors
        segments, (weight,) = ctx.segments, ctx.parameters
        dtype, dims = torch.promote_types(x.dtype, torch.float32), list(range(1, x.dim()))
        wide, dy = cast(x, dtype), cast(dy, dtype)
        eps = torch.finfo(dtype).eps if ctx.eps is None else ctx.eps
        scale = wide.square().mean(dims, keepdim=True).add_(eps).rsqrt_()
        normalised = wide * scale
        dx = dw = None
        if ctx.needs_input_grad[0]:
            inner = dy * gathered
            dx = inner.sub_(normalised * (inner * normalised).mean(dims, keepdim=True)).mul_(scale).to(x.dtype)
        if ctx.needs_input_grad[1]:
            products = segments.sort(normalised.mul_(dy))
            dw = ctx.sink.products(weight, products, lambda products, rows: products[rows].sum(0), segments)
        return dx, dw, None, None, None, None
