"""Linear, LayerNorm and embedding whose backward can write one gradient per task.

Shapes: N rows of T tasks, task t owns rows segments.host[t]:segments.host[t + 1]. With `task_grads` None these are
torch's own ops.
Rows of different tasks never mix, so in one backward of sum_t L_t the rows of task t carry exactly the gradient of L_t:
dW_t = dY[segment t]^T X[segment t], and the T gradients cost what one costs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmtl.surgery.segments import Segments
from fastmtl.surgery.task_gradients import TaskGradients


def linear(
    x: Tensor,
    weight: nn.Parameter,
    bias: nn.Parameter | None,
    segments: Segments,
    task_grads: TaskGradients | None = None,
) -> Tensor:
    """x [N, in], weight [out, in], bias [out] -> [N, out], as torch.nn.functional.linear."""
    if task_grads is None:
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias, segments, task_grads)


def layer_norm(
    x: Tensor,
    weight: nn.Parameter,
    bias: nn.Parameter,
    eps: float,
    segments: Segments,
    task_grads: TaskGradients | None = None,
) -> Tensor:
    """x [N, d], weight [d], bias [d] -> [N, d], as torch.nn.functional.layer_norm over the last dimension."""
    if task_grads is None:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    return _LayerNorm.apply(x, weight, bias, eps, segments, task_grads)


def embedding(ids: Tensor, weight: nn.Parameter, segments: Segments, task_grads: TaskGradients | None = None) -> Tensor:
    """ids int64 [N], weight [V, d] -> [N, d], as F.embedding. Takes the sink's anchor into the graph."""
    if task_grads is None:
        return F.embedding(ids, weight)
    return _Embedding.apply(task_grads.anchor, ids, weight, segments, task_grads)


def _rows_weights(task_grads: TaskGradients, segments: Segments, like: Tensor) -> Tensor:
    """weights[task of row], [N, 1]."""
    assert task_grads.weights is not None
    sizes = torch.tensor([b - a for a, b in zip(segments.host, segments.host[1:], strict=False)], device=like.device)
    return task_grads.weights.to(like.dtype).repeat_interleave(sizes, output_size=segments.host[-1]).unsqueeze(1)


def _write(task_grads: TaskGradients, parameter: nn.Parameter, segments: Segments, product: Any) -> Tensor | None:
    """Sends product(rows) of every task's segment where the mode wants it, or returns autograd's gradient."""
    if task_grads.mode == "weighted":
        return product(slice(0, segments.host[-1]), True)
    if task_grads.mode == "stack":
        for t, view in enumerate(task_grads.views(parameter)):
            if segments.host[t + 1] > segments.host[t]:
                view += product(slice(segments.host[t], segments.host[t + 1]), False)
        return None
    parts = [product(slice(a, b), False) for a, b in zip(segments.host, segments.host[1:], strict=False)]
    task_grads.add(parameter, torch.stack(parts))
    return None


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
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gathered, _ = ctx.saved_tensors
        weight, bias = ctx.parameters
        task_grads, segments = ctx.task_grads, ctx.segments
        dx = dy @ gathered if ctx.needs_input_grad[0] else None
        if task_grads.mode is None:
            dw = dy.t() @ x if ctx.needs_input_grad[1] else None
            db = dy.sum(0) if ctx.needs_input_grad[2] else None
            return dx, dw, db, None, None
        weighted = dy * _rows_weights(task_grads, segments, dy) if task_grads.mode == "weighted" else dy

        def product_weight(rows: slice, use_weights: bool) -> Tensor:
            return (weighted if use_weights else dy)[rows].t() @ x[rows]

        def product_bias(rows: slice, use_weights: bool) -> Tensor:
            return (weighted if use_weights else dy)[rows].sum(0)

        dw = _write_weight(task_grads, weight, segments, dy, x, product_weight) if task_grads.wants(weight) else None
        db = _write(task_grads, bias, segments, product_bias) if task_grads.wants(bias) else None
        return dx, dw, db, None, None


def _write_weight(
    task_grads: TaskGradients, weight: nn.Parameter, segments: Segments, dy: Tensor, x: Tensor, product: Any
) -> Tensor | None:
    if task_grads.mode == "stack" and task_grads.views(weight)[0].dtype == dy.dtype:
        for t, view in enumerate(task_grads.views(weight)):  # the product adds into J: no T x out x in temporary
            rows = slice(segments.host[t], segments.host[t + 1])
            if rows.stop > rows.start:
                view.addmm_(dy[rows].t(), x[rows])
        return None
    return _write(task_grads, weight, segments, product)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: nn.Parameter,
        bias: nn.Parameter,
        eps: float,
        segments: Segments,
        task_grads: TaskGradients,
    ) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.parameters = weight, bias
        ctx.segments, ctx.task_grads = segments, task_grads
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *gathered, mean, rstd = ctx.saved_tensors
        weight, bias = ctx.parameters
        task_grads, segments = ctx.task_grads, ctx.segments
        shape = gathered[0].shape
        if task_grads.mode is None:
            mask = list(ctx.needs_input_grad[:3])
            dx, dw, db = torch.ops.aten.native_layer_norm_backward(dy, x, shape, mean, rstd, *gathered, mask)
            return dx, dw, db, None, None, None
        dx, _, _ = torch.ops.aten.native_layer_norm_backward(dy, x, shape, mean, rstd, *gathered, [True, False, False])
        scaled = dy * _rows_weights(task_grads, segments, dy) if task_grads.mode == "weighted" else dy
        dw = db = None
        if task_grads.wants(weight):
            terms = scaled.float() * (x.float() - mean) * rstd
            dw = _write(task_grads, weight, segments, lambda rows, _: terms[rows].sum(0))
        if task_grads.wants(bias):
            db = _write(task_grads, bias, segments, lambda rows, _: scaled[rows].sum(0, dtype=torch.float32))
        cast = (None if g is None else g.to(weight.dtype) for g in (dw, db))
        return dx, *cast, None, None, None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, ids: Tensor, weight: nn.Parameter, segments: Segments, task_grads: TaskGradients
    ) -> Tensor:
        ctx.save_for_backward(ids, weight)
        ctx.parameter = weight
        ctx.segments, ctx.task_grads = segments, task_grads
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        ids, _ = ctx.saved_tensors
        weight = ctx.parameter
        task_grads, segments = ctx.task_grads, ctx.segments
        anchor = dy.new_zeros(()).to(task_grads.anchor.dtype)
        shape = weight.ds_shape if hasattr(weight, "ds_shape") else weight.shape  # ZeRO 3 keeps the shape there

        def table(rows: slice, scaled: Tensor = dy) -> Tensor:
            return scaled.new_zeros(shape).index_add_(0, ids[rows], scaled[rows])

        if task_grads.mode is None:
            return anchor, None, table(slice(0, len(ids))) if ctx.needs_input_grad[2] else None, None, None
        if not task_grads.wants(weight):
            return anchor, None, None, None, None
        if task_grads.mode == "weighted":
            return anchor, None, table(slice(0, len(ids)), dy * _rows_weights(task_grads, segments, dy)), None, None
        if task_grads.is_sparse(weight):
            for t, (start, stop) in enumerate(zip(segments.host, segments.host[1:], strict=False)):
                task_grads.add_rows(weight, t, ids[start:stop], dy[start:stop])
            return anchor, None, None, None, None
        return anchor, None, _write(task_grads, weight, segments, lambda rows, _: table(rows)), None, None
