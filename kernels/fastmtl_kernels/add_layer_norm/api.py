"""Residual LayerNorm with bias, dropout and a task-specific summand, on packed rows.

    z = residual + dropout(x + x_bias) + ts             dz  = rstd (g - mean(g) - h mean(g h)),  g = dy weight
    h = (z - mean(z)) rstd,  rstd = 1 / sqrt(var + eps)  dx  = keep dz / (1 - dropout_p)
    y = h weight + bias                                  dweight = sum dy h, dbias = sum dy, dx_bias = sum dx

residual, x, ts, y [N, d]; weight, bias, x_bias [d]; the sums are over the rows of one task. Statistics and sums are
float32, z has residual's dtype, in which it is kept for backward. An implementation is a module with `forward`,
`backward` and `recompute`: add_layer_norm_cpp, add_layer_norm_triton; what the first gives the second to know what was
dropped is its own choice. Equal inputs give equal bits. Not differentiable twice.

Source: as fastmtl_kernels.add_layer_norm.reference.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastmtl_kernels.add_layer_norm import reference
from fastmtl_kernels.dispatch import RowImpl, backend, select
from fastmtl_kernels.philox import check_dropout, describe
from fastmtl_kernels.task_sink import TaskRows, TaskSink, TokenOffsets, check_sink, common_dtype, gradient

# Told of a result, and of what makes it again, bit for bit, from what is kept for backward anyway.
Register = Callable[[Tensor, Callable[[], Tensor]], None]


def add_layer_norm(
    residual: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    ts: Tensor | None = None,
    x_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    eps: float = 1e-12,
    seed: Tensor | None = None,
    token_offsets: TokenOffsets | None = None,
    task_grads: TaskSink | None = None,
    register: Register | None = None,
    impl: RowImpl = "auto",
) -> Tensor:
    """LayerNorm(residual + dropout(x + x_bias) + ts).

    Args:
        residual: [N, d], floating point, any strides.
        x: [N, d], what dropout is applied to.
        weight: [d].
        bias: [d].
        ts: [N, d], added after dropout: the adapters' output.
        x_bias: [d], added before dropout: the bias of the linear layer that made x.
        dropout_p: the probability of dropping an element of x + x_bias, in [0, 1).
        eps: added to the variance.
        seed: int64 of one element on residual's device, one for each call in a step; needed where dropout_p > 0.
        token_offsets: which rows belong to which task: int32 [T + 1] on residual's device, or the numbers on the host,
            or an object with both as `offsets` and `host`. Rows past the last are a masked tail: zeros in y and in all
            gradients.
        task_grads: the sink that weight's, bias's and x_bias's gradients go to, one per task; None for one sum each.
        register: called with y and a function that recomputes y, where a backward may come. That function reads weight
            and bias as they are in forward. Not called by "reference".
        impl: "auto", "reference", "triton" (CUDA tensors) or "cpp" (CPU tensors).

    Returns:
        y [N, d] of residual's dtype.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device; the message names it.
        RuntimeError: the implementation asked for is not available here; the message says why.
    """
    _check_rows(residual, {"x": x, "ts": ts})
    check_columns(residual, {"weight": weight, "bias": bias, "x_bias": x_bias})
    check_dropout(dropout_p, seed, residual.device)
    check_sink(token_offsets, task_grads)
    tasks = TaskRows.make(token_offsets, residual.shape[0], residual.device)
    kernels = backend("add_layer_norm", select(impl, residual, x, ts, weight, bias, x_bias))
    if kernels is None:
        return reference.add_layer_norm(
            residual, x, weight, bias, ts=ts, x_bias=x_bias, dropout_p=dropout_p, eps=eps, seed=seed, tasks=tasks,
            task_grads=task_grads,
        )  # fmt: skip
    dtype = common_dtype(weight, bias, x_bias)
    call = RowNorm(kernels, dropout_p, eps, tasks, task_grads, torch.is_grad_enabled(), dtype, register)
    return _AddLayerNorm.apply(residual, x, weight, bias, ts, x_bias, seed if dropout_p > 0 else None, call)


class RowNorm(NamedTuple):
    """What forward and backward share besides tensors.

    saves: whether a backward may come. sums_dtype: of the parameters' gradients where there is no sink; an
    implementation may return float32 instead. register: see above.
    """

    kernels: ModuleType
    dropout_p: float
    eps: float
    tasks: TaskRows
    sink: TaskSink | None
    saves: bool
    sums_dtype: torch.dtype = torch.float32
    register: Register | None = None


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        residual: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        ts: Tensor | None,
        x_bias: Tensor | None,
        seed: Tensor | None,
        call: RowNorm,
    ) -> Tensor:
        y, z, mean, rstd, dropped = call.kernels.forward(residual, x, ts, x_bias, weight, bias, seed, call)
        # The parameters themselves are saved: under ZeRO 3 their storage is gathered again when backward comes.
        ctx.save_for_backward(z, mean, rstd, weight, dropped)
        # A sink knows parameters by identity, and under checkpointing saved tensors come back as other objects.
        ctx.parameters = weight, bias, x_bias
        ctx.call = call
        ctx.dtypes = x.dtype, None if ts is None else ts.dtype
        if call.register is not None and any(ctx.needs_input_grad):
            # Detached, as ZeRO 3 gives a parameter other memory when its module is done.
            kept = z, mean, rstd, weight.detach(), bias.detach()
            call.register(y, partial(call.kernels.recompute, *kept, call._replace(register=None)))
        if call.sink is not None:
            call.sink.expect(*[parameter for parameter in ctx.parameters if parameter is not None])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z, mean, rstd, weight, dropped = ctx.saved_tensors
        call, (x_dtype, ts_dtype) = ctx.call, ctx.dtypes
        wants = _Wants(*ctx.needs_input_grad[:6])
        dz, dx, sums = call.kernels.backward(
            dy, z, mean, rstd, weight, dropped, call,
            dx_dtype=x_dtype if wants.x or wants.x_bias else None,
            num_sums=3 if wants.x_bias else 2 if wants.weight or wants.bias else 0,
        )  # fmt: skip
        wanted = wants.weight, wants.bias, wants.x_bias
        gradients = [
            gradient(call.sink, parameter, sums[k]) if asked else None
            for k, (parameter, asked) in enumerate(zip(ctx.parameters, wanted, strict=True))
        ]
        dts = dz.to(ts_dtype) if wants.ts else None
        return (
            dz if wants.residual else None, dx if wants.x else None, gradients[0], gradients[1], dts, gradients[2],
            None, None,
        )  # fmt: skip


class _Wants(NamedTuple):
    residual: bool
    x: bool
    weight: bool
    bias: bool
    ts: bool
    x_bias: bool


def _check_rows(residual: Tensor, others: dict[str, Tensor | None]) -> None:
    if not isinstance(residual, Tensor) or residual.dim() != 2 or not residual.is_floating_point():
        raise ValueError(f"residual must be floating point of shape [N, d], got {describe(residual)}")
    if residual.shape[1] == 0:
        raise ValueError(f"residual must have at least one column, got {describe(residual)}")
    for name, rows in others.items():
        if rows is None and name == "ts":
            continue
        if not isinstance(rows, Tensor) or rows.shape != residual.shape or not rows.is_floating_point():
            raise ValueError(
                f"{name} must be floating point of residual's shape {list(residual.shape)}, got {describe(rows)}"
            )
        if rows.device != residual.device:
            raise ValueError(f"{name} must be on {residual.device} like residual, got {rows.device}")


def check_columns(rows: Tensor, parameters: dict[str, Tensor | None]) -> None:
    """Raises a ValueError that names the parameter that is not floating point [d] on the device of rows [N, d]."""
    for name, parameter in parameters.items():
        if parameter is None and name == "x_bias":
            continue
        if not isinstance(parameter, Tensor) or parameter.dim() != 1 or not parameter.is_floating_point():
            raise ValueError(f"{name} must be floating point of shape [{rows.shape[1]}], got {describe(parameter)}")
        if parameter.shape[0] != rows.shape[1]:
            raise ValueError(f"{name} must have the shape [{rows.shape[1]}], got {describe(parameter)}")
        if parameter.device != rows.device:
            raise ValueError(f"{name} must be on {rows.device} like the rows, got {parameter.device}")
