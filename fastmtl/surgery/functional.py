"""Linear, LayerNorm and embedding whose backward can write one gradient per task.

Shapes: N rows of T tasks, task t owns rows segments.host[t]:segments.host[t + 1]. With `task_grads` None or not armed
these are torch's own ops. A sink that is armed in forward must be so in backward.
Rows of different tasks never mix, so in one backward of sum_t L_t the rows of task t carry exactly the gradient of L_t:
dW_t = dY[segment t]^T X[segment t], and the T gradients cost what one costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmtl.cuda_graphs.writes import RecordedWrites
from fastmtl.errors import UserError
from fastmtl.surgery.segments import Segments
from fastmtl.surgery.sinks.kept import KeptGradients
from fastmtl.surgery.sinks.task_gradients import TaskGradients
from fastmtl_kernels.cast import cast


def linear(
    x: Tensor,
    weight: nn.Parameter,
    bias: nn.Parameter | None,
    segments: Segments,
    task_grads: TaskGradients | None = None,
) -> Tensor:
    """x [N, in], weight [out, in], bias [out] -> [N, out], as torch.nn.functional.linear.

    Raises UserError for an x of other dimensions, and for one with fewer rows than the segments have.
    """
    if task_grads is None or task_grads.mode is None:
        return F.linear(x, weight, bias)
    check_rows("linear", x, 2, segments)
    if torch.is_autocast_enabled(x.device.type):  # what backward multiplies has to have the product's dtype
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _Linear.apply(x, weight, bias, segments, task_grads)


def layer_norm(
    x: Tensor,
    weight: nn.Parameter | None,
    bias: nn.Parameter | None,
    eps: float,
    segments: Segments,
    task_grads: TaskGradients | None = None,
) -> Tensor:
    """x [N, d], weight [d], bias [d] -> [N, d], as torch.nn.functional.layer_norm over the last dimension.

    weight, bias: None as in torch.nn.LayerNorm(elementwise_affine=False) and LayerNorm(bias=False).
    Raises UserError for an x of other dimensions, and for one with fewer rows than the segments have.
    """
    if weight is None or task_grads is None or task_grads.mode is None:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    check_rows("layer_norm", x, 2, segments)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(weight.dtype)
    return _LayerNorm.apply(x, weight, bias, eps, segments, task_grads)


def embedding(ids: Tensor, weight: nn.Parameter, segments: Segments, task_grads: TaskGradients | None = None) -> Tensor:
    """ids int64 [N], weight [V, d] -> [N, d], as F.embedding. Takes the sink's anchor into the graph.

    Raises UserError for ids of other dimensions, and for fewer ids than the segments have rows.
    """
    if task_grads is None or task_grads.mode is None:
        return F.embedding(ids, weight)
    check_rows("embedding", ids, 1, segments)
    return _Embedding.apply(task_grads.anchor, ids, weight, segments, task_grads)


def check_rows(op: str, x: Tensor, dims: int, segments: Segments) -> None:
    if x.dim() != dims:
        wanted, way = ("[N]", "ids.flatten()") if dims == 1 else ("[N, width]", "x.flatten(0, -2)")
        raise UserError(
            f"functional.{op}: an input of shape {tuple(x.shape)} where {wanted} is needed, the rows of all tasks in "
            f"one dimension: give it {way}, and Segments that count these rows"
        )
    if segments.host[-1] > len(x):
        raise UserError(
            f"functional.{op}: the segments end at row {segments.host[-1]}, but the input has {len(x)} rows: Segments "
            "count the rows of what the layer is given (tokens, not texts, where a row is a token)"
        )


def weighted_rows(dy: Tensor, task_grads: TaskGradients, segments: Segments) -> Tensor:
    """The tasks' rows of dy times weights[task of row], multiplied in float32: a weight rounded to bf16 would be off
    in every row.
    """
    assert task_grads.weights is not None
    return (dy[: segments.host[-1]] * segments.per_row(task_grads.weights.float()).unsqueeze(1)).to(dy.dtype)


def _segment_rows(segments: Segments) -> list[slice]:
    return [slice(a, b) for a, b in zip(segments.host, segments.host[1:], strict=False)]


def _gradient(
    ctx: Any, index: int, parameter: nn.Parameter | None, dy: Tensor, product: Callable[[Tensor, slice], Tensor]
) -> Tensor | None:
    """The gradient for autograd of the parameter that is argument `index`: none where the sink takes it.

    product(dy, rows) is the gradient from some rows; the sum of them all where the parameter belongs to tasks.
    """
    task_grads, segments = ctx.task_grads, ctx.segments
    if parameter is None or not ctx.needs_input_grad[index]:
        return None
    every_row = slice(0, segments.host[-1])
    if not task_grads.wants(parameter):
        return product(dy, every_row)
    match task_grads.armed_mode():
        case "weighted":
            return product(weighted_rows(dy, task_grads, segments), every_row)
        case "stack":  # one at a time, as T of them at once are a temporary as large as the parameter's part of J
            stack = task_grads.stack_of(parameter)
            for task, rows in enumerate(_segment_rows(segments)):
                if rows.stop > rows.start:
                    stack.add_task(parameter, task, product(dy, rows))
            task_grads.written(parameter)
            return None
    return task_grads.deliver(parameter, torch.stack([product(dy, rows) for rows in _segment_rows(segments)]))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        segments: Segments,
        task_grads: TaskGradients,
    ) -> Tensor:
        # The parameters themselves are saved: ZeRO 3 has gathered their storage again when backward comes.
        ctx.save_for_backward(x, weight, bias)
        # The sink knows parameters by identity, and under checkpointing saved tensors come back as other objects.
        ctx.parameters = weight, bias
        ctx.segments, ctx.task_grads = segments, task_grads
        task_grads.expect(weight, bias)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gathered, _ = ctx.saved_tensors
        dx = dy.mm(cast(gathered, dy.dtype)) if ctx.needs_input_grad[0] else None
        weight, bias = ctx.parameters
        dw, db = linear_gradients(ctx, (1, 2), weight, bias, dy, x)
        return dx, dw, db, None, None


def linear_gradients(
    ctx: Any,
    places: tuple[int, int],
    weight: nn.Parameter,
    bias: nn.Parameter | None,
    dy: Tensor,
    x: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients for autograd of a Linear's weight and bias, which are the arguments `places` of an autograd
    function: None where the sink takes them. dy [N, out], rows of any stride; x [N, in].
    """
    task_grads, segments = ctx.task_grads, ctx.segments
    if isinstance(task_grads, RecordedWrites):
        task_grads.linear(weight, bias, dy, x)
        return None, None
    if task_grads.armed_mode() == "stack" and task_grads.dtype == dy.dtype and task_grads.wants(weight):
        if bias is None or task_grads.wants(bias):
            _stack_linear(task_grads, weight, bias, segments.split(dy.t(), dim=1), segments.split(x))
            return None, None
    dw = None
    if isinstance(task_grads, KeptGradients) and task_grads.wants(weight):
        task_grads.keep(weight, dy, x, segments)
    else:
        dw = _gradient(ctx, places[0], weight, dy, lambda dy, rows: dy[rows].t() @ x[rows])
    db = _gradient(ctx, places[1], bias, dy, lambda dy, rows: dy[rows].sum(0))
    return dw, db


def _stack_linear(
    task_grads: TaskGradients,
    weight: nn.Parameter,
    bias: nn.Parameter | None,
    dy: Sequence[Tensor],
    x: Sequence[Tensor],
) -> None:
    """dy [out, n] and x [n, in] of each task. Made inside J: no T x out x in temporary, and three calls a task."""
    stack = task_grads.stack_of(weight)
    for task, (left, right) in enumerate(zip(dy, x, strict=True)):
        if len(right):
            stack.add_product(weight, task, left, right)
            if bias is not None:
                stack.add_sum(bias, task, left)
    task_grads.written(weight)
    if bias is not None:
        task_grads.written(bias)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        eps: float,
        segments: Segments,
        task_grads: TaskGradients,
    ) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.parameters = weight, bias
        ctx.segments, ctx.task_grads = segments, task_grads
        task_grads.expect(weight, bias)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *gathered, mean, rstd = ctx.saved_tensors
        weight, bias = ctx.parameters
        mask = [ctx.needs_input_grad[0], False, False]
        dx, _, _ = torch.ops.aten.native_layer_norm_backward(dy, x, gathered[0].shape, mean, rstd, *gathered, mask)
        normalised = (x.float() - mean) * rstd if ctx.needs_input_grad[1] else None

        def product(dy: Tensor, rows: slice) -> Tensor:
            assert normalised is not None
            return (dy[rows].float() * normalised[rows]).sum(0)

        dw = _gradient(ctx, 1, weight, dy, product)
        db = _gradient(ctx, 2, bias, dy, lambda dy, rows: dy[rows].sum(0, dtype=torch.float32))
        return dx, dw, db, None, None, None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, ids: Tensor, weight: nn.Parameter, segments: Segments, task_grads: TaskGradients
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.parameter = weight
        ctx.shape = weight.shape
        ctx.segments, ctx.task_grads = segments, task_grads
        task_grads.expect(weight)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        sink = ctx.task_grads
        anchor = torch.zeros_like(sink.anchor)
        table = sink.deliver_rows(ctx.parameter, ids, dy, ctx.segments.host) if ctx.needs_input_grad[2] else None
        return anchor, None, None if table is None else table.to(dy.dtype), None, None
