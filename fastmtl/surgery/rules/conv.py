"""Convolution over one, two or three dimensions with one gradient per task.

    Y = W * X + b           dW_t: the weight's gradient of the convolution over the rows of t alone
                            db_t = sum of dY over the rows of t and all positions

Shapes: X [N, in, *positions]; W [out, in / groups, *kernel]; b [out]; Y, dY [N, out, *positions].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmtl.errors import UserError
from fastmtl.surgery.rules.rule import Known, Rows, known_to
from fastmtl.surgery.segments import Segments
from fastmtl.surgery.sinks.sink import Sink
from fastmtl_kernels.cast import cast


class Settings(NamedTuple):
    """Settings of a convolution, one number per dimension; padding: zeros at both ends."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def conv_rule(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, rows: Rows, sink: Sink, x: Tensor) -> Tensor:
    """Run an nn.Conv1d, Conv2d or Conv3d on x [N, in, *positions]; return [N, out, *positions].

    Raises UserError for an input without a dimension of rows.
    """
    if x.dim() != module.weight.dim():
        raise UserError(
            f"{type(module).__name__}: an input of shape {tuple(x.shape)} has no dimension for the rows of the batch: "
            "give it [rows, channels, ...]"
        )
    known, segments = known_to(rows, module, "weight", "bias"), rows.segments(len(x))
    x, padding = _padded(module, x)
    if torch.is_autocast_enabled(x.device.type):  # backward needs x in the dtype of the convolution
        x = x.to(torch.get_autocast_dtype(x.device.type))
    settings = Settings(module.stride, padding, module.dilation, module.groups)
    return _Conv.apply(x, module.weight, module.bias, known, settings, segments, sink)


def conv1d(
    x: Tensor,
    weight: nn.Parameter,
    bias: nn.Parameter | None,
    padding: int,
    groups: int,
    segments: Segments,
    task_grads: Sink | None = None,
) -> Tensor:
    """Convolve x [N, in, positions], with `padding` zeros at both ends; return [N, out, positions].

    weight: [out, in / groups, kernel]. bias: [out]. Task gradients as in functional.linear.
    """
    if task_grads is None or not task_grads.active:
        return F.conv1d(x, weight, bias, padding=padding, groups=groups)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    settings = Settings((1,), (padding,), (1,), groups)
    return _Conv.apply(x, weight, bias, (weight, bias), settings, segments, task_grads)


def is_plain_convolution(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> bool:
    """Return True if the module computes torch's convolution; a subclass may compute another."""
    return type(module)._conv_forward in (nn.Conv1d._conv_forward, nn.Conv2d._conv_forward, nn.Conv3d._conv_forward)


def _padded(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return the input, and the number of zeros that the convolution adds at both ends.

    Padding of another mode, or of other widths at the two ends, is added to the input here.
    """
    none, widths = (0,) * len(module.kernel_size), module._reversed_padding_repeated_twice
    if module.padding_mode != "zeros":
        return F.pad(x, widths, mode=module.padding_mode), none
    if widths[::2] != widths[1::2]:  # "same" with an even kernel
        return F.pad(x, widths), none
    return x, tuple(reversed(widths[::2]))


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        known: Known,
        settings: Settings,
        segments: Segments,
        sink: Sink,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)  # the parameter itself, as in linear.py
        ctx.parameters, ctx.settings, ctx.segments, ctx.sink = known, settings, segments, sink
        sink.expect(*known)
        conv = (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3]
        return conv(x, weight, bias, *settings)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gathered = ctx.saved_tensors
        sink, segments, (weight, bias) = ctx.sink, ctx.segments, ctx.parameters
        gathered = cast(gathered, dy.dtype)
        dx = _gradients(dy, x, gathered, ctx.settings, 0) if ctx.needs_input_grad[0] else None
        dw = db = None
        if any(ctx.needs_input_grad[1:3]):
            dy = segments.sort(dy)
        if ctx.needs_input_grad[1]:
            x = segments.sort(x)

            def product(dy: Tensor, rows: slice) -> Tensor:
                return _gradients(dy[rows], x[rows], gathered, ctx.settings, 1)

            dw = sink.products(weight, dy, product, segments)
        if bias is not None and ctx.needs_input_grad[2]:
            per_row = dy.flatten(2).sum(2, dtype=torch.promote_types(dy.dtype, torch.float32))
            db = sink.products(bias, per_row, lambda per_row, rows: per_row[rows].sum(0), segments)
        return dx, dw, db, None, None, None, None


def _gradients(dy: Tensor, x: Tensor, weight: Tensor, settings: Settings, which: int) -> Tensor:
    """Return the gradient of the input, which = 0, or of the weight, which = 1."""
    stride, padding, dilation, groups = settings
    mask = [which == 0, which == 1, False]
    return torch.ops.aten.convolution_backward(
        dy, x, weight, None, stride, padding, dilation, False, [0] * len(stride), groups, mask
    )[which]
