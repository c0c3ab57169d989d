"""Residual LayerNorm with dropout and a task-specific summand, on packed rows.

    z = residual + dropout(x) + ts      dz = rstd (g - mean(g) - h mean(g h)) + dsum,  g = dy weight
    h = (z - mean(z)) rstd              dx = keep dz / (1 - dropout_p)
    y = h weight + bias                 dweight = sum dy h,  dbias = sum dy

rstd = 1 / sqrt(var + eps). residual, x, ts, y [N, d]; weight, bias [d]; the sums are over the rows
of one task. dsum is the gradient of z where z is a result as well, as in pre-norm layers, else 0.
keep is 0 for an element that dropout drops, else 1. Statistics and sums are float32. z
is kept for backward in residual's dtype. An implementation is a module with `forward`, `backward`
and `recompute`; the last result of `forward` (a mask or the seed) gives `backward` the dropped
elements. Equal inputs give equal bits. Not differentiable twice.

Source: see fastmtl_kernels.add_layer_norm.reference.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastmtl_kernels.add_layer_norm import cpp, reference
from fastmtl_kernels.checks import check_columns, check_dropout, describe
from fastmtl_kernels.dispatch import RowImpl, select
from fastmtl_kernels.layer_norm.common import Register, RowNorm
from fastmtl_kernels.task_sink import TaskRows, TaskSink, TokenOffsets, check_sink, common_dtype, gradient


def add_layer_norm(
    residual: Tensor,
    x: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    ts: Tensor | None = None,
    dropout_p: float = 0.0,
    eps: float = 1e-12,
    seed: Tensor | None = None,
    token_offsets: TokenOffsets | None = None,
    task_grads: TaskSink | None = None,
    register: Register | None = None,
    impl: RowImpl = "auto",
) -> Tensor:
    """Return LayerNorm(residual + dropout(x) + ts), differentiable in all tensors but the seed.

    Args:
        residual: [N, d], floating point, any strides.
        x: [N, d], the rows that dropout is applied to; None for none, and without dropout.
        weight: [d], the factor of LayerNorm.
        bias: [d], the summand of LayerNorm; None for none.
        ts: [N, d], the output of a task-specific layer (an adapter), added after dropout.
        dropout_p: the probability of dropping an element of x, in [0, 1).
        eps: added to the variance.
        seed: int64 of one element on residual's device; needed if dropout_p > 0. Each call in a
            step needs its own seed, since equal seeds drop equal elements.
        token_offsets: task t has the rows token_offsets[t]:token_offsets[t + 1]. An int32 [T + 1]
            on residual's device, or a sequence of T + 1 integers, or an object with both as
            `offsets` and `host`. Rows past the last offset are padding: y and all gradients are
            zero there. None: all rows are one task.
        task_grads: the sink, which receives the gradients of weight and bias per task; None for
            autograd's usual gradients, summed over tasks.
        register: a function for recomputing y instead of keeping it. It is called with y and with
            a function that recomputes y from the weight and bias of this forward. Not called if no
            gradient is needed, nor by "reference".
        impl: "auto", "reference", "triton" (CUDA tensors) or "cpp" (CPU tensors).

    Returns:
        y [N, d] of residual's dtype.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device; the message names it.
        RuntimeError: the implementation is not available here; the message gives the reason.
    """
    y, _ = _normalised(
        residual, x, weight, bias, ts, dropout_p, eps, seed, token_offsets, task_grads, register, impl, False
    )
    return y


def add_layer_norm_with_sum(
    residual: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    dropout_p: float = 0.0,
    eps: float = 1e-12,
    seed: Tensor | None = None,
    token_offsets: TokenOffsets | None = None,
    task_grads: TaskSink | None = None,
    register: Register | None = None,
    impl: RowImpl = "auto",
) -> tuple[Tensor, Tensor]:
    """Return z = residual + dropout(x) and LayerNorm(z), for layers that normalise their input.

    The arguments and errors are those of `add_layer_norm`. Both results are [N, d] of residual's
    dtype and differentiable; z is the tensor that backward needs, so it takes no more memory.
    """
    if x is None:
        raise ValueError("x must be floating point of residual's shape, got None")
    y, z = _normalised(
        residual, x, weight, bias, None, dropout_p, eps, seed, token_offsets, task_grads, register, impl, True
    )
    assert z is not None
    return z, y


def _normalised(
    residual: Tensor,
    x: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    ts: Tensor | None,
    dropout_p: float,
    eps: float,
    seed: Tensor | None,
    token_offsets: TokenOffsets | None,
    task_grads: TaskSink | None,
    register: Register | None,
    impl: RowImpl,
    returns_sum: bool,
) -> tuple[Tensor, Tensor | None]:
    """Check the arguments; return y, and z if it is asked for."""
    _check_rows(residual, {name: rows for name, rows in (("x", x), ("ts", ts)) if rows is not None})
    if x is None and dropout_p > 0:
        raise ValueError("dropout_p must be 0 where x is None: dropout applies to x")
    check_columns(residual, {"weight": weight} if bias is None else {"weight": weight, "bias": bias})
    check_dropout(dropout_p, seed, residual.device)
    check_sink(token_offsets, task_grads)
    tasks = TaskRows.make(token_offsets, residual.shape[0], residual.device)
    kernels = _kernels(select("add_layer_norm", impl, residual, x, ts, weight, bias))
    if kernels is None:
        return reference.add_layer_norm(
            residual, x, weight, bias, ts=ts, dropout_p=dropout_p, eps=eps, seed=seed, tasks=tasks,
            task_grads=task_grads,
        )  # fmt: skip
    dtype = common_dtype(weight, bias)
    call = RowNorm(kernels, dropout_p, eps, tasks, task_grads, torch.is_grad_enabled(), dtype, register, returns_sum)
    found = _AddLayerNorm.apply(residual, x, weight, bias, ts, seed if dropout_p > 0 else None, call)
    return found if returns_sum else (found, None)


def _kernels(impl: str) -> ModuleType | None:
    """Return the module of an implementation, None for the reference."""
    match impl:
        case "cpp":
            return cpp
        case "triton":
            from fastmtl_kernels.add_layer_norm import triton

            return triton
        case _:
            return None


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        residual: Tensor,
        x: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        ts: Tensor | None,
        seed: Tensor | None,
        call: RowNorm,
    ) -> Tensor | tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        y, z, mean, rstd, dropped = call.kernels.forward(residual, x, ts, weight, bias, seed, call)
        # The parameters themselves are saved, not copies: under ZeRO 3 their storage is released
        # after forward and gathered again for backward.
        ctx.save_for_backward(z, mean, rstd, weight, dropped)
        # A sink recognises a parameter as the same Python object, and with activation checkpointing
        # ctx.saved_tensors returns other objects.
        ctx.parameters = weight, bias
        ctx.call = call
        ctx.dtypes = None if x is None else x.dtype, None if ts is None else ts.dtype
        if call.register is not None and any(ctx.needs_input_grad):
            # Detached: the copies keep their memory when ZeRO 3 releases that of the parameters.
            kept = z.detach(), mean, rstd, weight.detach(), None if bias is None else bias.detach()
            call.register(y, partial(call.kernels.recompute, *kept, call._replace(register=None)))
        if call.sink is not None:
            call.sink.expect(*(parameter for parameter in ctx.parameters if parameter is not None))
        return (y, z) if call.returns_sum else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None = None) -> tuple[Tensor | None, ...]:
        z, mean, rstd, weight, dropped = ctx.saved_tensors
        call, (x_dtype, ts_dtype) = ctx.call, ctx.dtypes
        wants = _Wants(*ctx.needs_input_grad[:5])
        dy = torch.zeros_like(z) if dy is None else dy  # only z was used
        dz, dx, sums = call.kernels.backward(
            dy, z, mean, rstd, weight, dropped, call, dsum=dsum,
            dx_dtype=x_dtype if wants.x else None, want_sums=wants.weight or wants.bias,
        )  # fmt: skip
        d_weight, d_bias = (
            gradient(call.sink, parameter, sums[k]) if wanted else None
            for k, (parameter, wanted) in enumerate(zip(ctx.parameters, (wants.weight, wants.bias), strict=True))
        )
        dts = dz.to(ts_dtype) if wants.ts else None
        return dz if wants.residual else None, dx if wants.x else None, d_weight, d_bias, dts, None, None


class _Wants(NamedTuple):
    """Flags of the inputs whose gradient autograd needs."""

    residual: bool
    x: bool
    weight: bool
    bias: bool
    ts: bool


def _check_rows(residual: Tensor, others: dict[str, Tensor]) -> None:
    if not isinstance(residual, Tensor) or residual.dim() != 2 or not residual.is_floating_point():
        raise ValueError(f"residual must be floating point of shape [N, d], got {describe(residual)}")
    if residual.shape[1] == 0:
        raise ValueError(f"residual must have at least one column, got {describe(residual)}")
    for name, rows in others.items():
        if not isinstance(rows, Tensor) or rows.shape != residual.shape or not rows.is_floating_point():
            raise ValueError(
                f"{name} must be floating point of residual's shape {list(residual.shape)}, got {describe(rows)}"
            )
        if rows.device != residual.device:
            raise ValueError(f"{name} must be on {residual.device} like residual, got {rows.device}")
