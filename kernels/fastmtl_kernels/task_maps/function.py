"""One or two linear maps per task on packed rows: the core of low_rank, lora and pal.

    z = middle(x first_t + first_bias_t)            dz = dy' second_t^T
    y = dropout(last(z second_t + second_bias_t))   dy' = last'(...) dropout'(dy)
                                                    dx = dh first_t^T,  dh = middle'(...) dz
                                                    dsecond_t = z^T dy', dfirst_t = x^T dh
                                                    biases: sums over rows

The shapes are those of fastmtl_kernels.task_maps.reference, which defines every value. h is the
input of `middle`, dh its gradient. An implementation is a module with `forward` and `backward`;
the tensors that `forward` returns besides y are arguments of `backward`. Equal inputs give equal
bits. Not differentiable twice.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastmtl_kernels.task_maps import reference
from fastmtl_kernels.task_maps import torch as products
from fastmtl_kernels.task_maps.common import Maps, Wants
from fastmtl_kernels.task_sink import TaskRows


def maps(
    x: Tensor,
    first: Tensor | None,
    first_bias: Tensor | None,
    second: Tensor,
    second_bias: Tensor | None,
    *,
    tasks: TaskRows,
    impl: str,
    middle: str = "identity",
    last: str = "identity",
    rates: tuple[float, ...] = (),
    seed: Tensor | None = None,
) -> Tensor:
    """Return y [N, d_out] of x's dtype.

    impl: the implementation that `dispatch.select` returned. Parameters of another dtype are
    converted to x's. rates: the probability of dropout of each task; empty for no dropout.
    """
    seed = seed if any(rates) else None
    kernels = _kernels(impl)
    call = Maps(kernels, tasks, middle, last, rates, torch.is_grad_enabled())
    second = second.to(x.dtype)
    first, first_bias, second_bias = (None if p is None else p.to(x.dtype) for p in (first, first_bias, second_bias))
    if kernels is None:
        with torch.autocast(x.device.type, enabled=False):
            return reference.maps(x, first, first_bias, second, second_bias, seed, call)
    return _PerTaskMaps.apply(x, first, first_bias, second, second_bias, seed, call)


def _kernels(impl: str) -> ModuleType | None:
    """Return the module of an implementation, None for the reference."""
    match impl:
        case "triton":
            from fastmtl_kernels.task_maps.triton import launch

            return launch
        case "torch":
            return products
        case _:
            return None


class _PerTaskMaps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        first: Tensor | None,
        first_bias: Tensor | None,
        second: Tensor,
        second_bias: Tensor | None,
        seed: Tensor | None,
        call: Maps,
    ) -> Tensor:
        assert call.kernels is not None
        y, *kept = call.kernels.forward(x, first, first_bias, second, second_bias, seed, call)
        ctx.save_for_backward(x, first, second, second_bias, seed, *kept)
        ctx.call = call
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        wants = Wants(*ctx.needs_input_grad[:5])
        return *ctx.call.kernels.backward(dy, *ctx.saved_tensors, call=ctx.call, wants=wants), None, None
