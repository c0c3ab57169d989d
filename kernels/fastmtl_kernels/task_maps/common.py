"""One or two linear maps per task on packed rows, the common core of low_rank, lora and pal.

    z = middle(x first_t + first_bias_t)               dz = dy' second_t^T, dy' = last'(...) dropout'(dy)
    y = dropout(last(z second_t + second_bias_t))      dx = dh first_t^T,   dh  = middle'(...) dz
                                                       dsecond_t = z^T dy', dfirst_t = x^T dh, biases: sums over rows

Shapes as in low_rank_reference, which defines every value. An implementation is a module with `forward` and `backward`:
low_rank_torch, low_rank_triton; what the first keeps for the second is its own choice. Equal inputs give equal bits.
Not differentiable twice.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastmtl_kernels import dispatch
from fastmtl_kernels.philox import check_dropout, describe, keep_threshold
from fastmtl_kernels.task_maps import reference as low_rank_reference
from fastmtl_kernels.task_sink import TaskRows

Impl = Literal["auto", "reference", "torch", "triton"]
Activation = Literal["identity", "gelu", "relu"]
# Fastest first: "auto" takes the first that can be used.
IMPLS = ("triton", "torch", "reference")
ACTIVATIONS = ("identity", "gelu", "relu")
# A program of the Triton kernels holds whole rows of this width; what makes float32 exact takes two registers a number.
MAX_RANK = {torch.float16: 256, torch.bfloat16: 256, torch.float32: 64}


class Maps(NamedTuple):
    """What forward and backward share besides tensors.

    rates: each task's probability of dropout, without effect where there is no seed. saves: whether a backward may
        come.
    """

    kernels: Any
    tasks: TaskRows
    middle: str
    last: str
    rates: tuple[float, ...]
    saves: bool


class Wants(NamedTuple):
    """Which gradients autograd asks for."""

    x: bool
    first: bool
    first_bias: bool
    second: bool
    second_bias: bool


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
    """y [N, d_out] of x's dtype, by an implementation that `select` returned.

    Parameters of another dtype are converted to x's. rates: one for each task, or none at all.
    """
    seed = seed if any(rates) else None
    kernels = None if impl == "reference" else _kernels(impl)
    call = Maps(kernels, tasks, middle, last, rates, torch.is_grad_enabled())
    second = second.to(x.dtype)
    first, first_bias, second_bias = (None if p is None else p.to(x.dtype) for p in (first, first_bias, second_bias))
    if kernels is None:
        with torch.autocast(x.device.type, enabled=False):
            return low_rank_reference.maps(x, first, first_bias, second, second_bias, seed, call)
    return _PerTaskMaps.apply(x, first, first_bias, second, second_bias, seed, call)


def _kernels(impl: str) -> ModuleType:
    """Import an implementation late: not every machine has Triton."""
    if impl == "triton":
        from fastmtl_kernels.task_maps.triton import rows

        return rows
    from fastmtl_kernels.task_maps import torch as products

    return products


def to_autocast(x: Tensor) -> Tensor:
    """x in the dtype of autocast where that is on, as torch's own linear maps take it."""
    if x.dtype in dispatch.DTYPES and torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


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
        y, *kept = call.kernels.forward(x, first, first_bias, second, second_bias, seed, call)
        ctx.save_for_backward(x, first, second, second_bias, seed, *kept)
        ctx.call = call
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        wants = Wants(*ctx.needs_input_grad[:5])
        return *ctx.call.kernels.backward(dy, *ctx.saved_tensors, call=ctx.call, wants=wants), None, None


def select(impl: str, x: Tensor, rank: int, name: str) -> str:
    """The implementation for these rows.

    Raises:
        ValueError: impl is no implementation, or `rank`, the width of what is named, too large for it.
        RuntimeError: the implementation asked for cannot be used here; the message says why.
    """
    if impl == "auto":
        usable = not unsupported_reason("triton", x.device, {x.dtype}) and rank <= MAX_RANK[x.dtype]
        return "triton" if usable else "torch"
    if impl not in IMPLS:
        raise ValueError(f"impl must be 'auto', {', '.join(map(repr, IMPLS))}, got {impl!r}")
    reason = unsupported_reason(impl, x.device, {x.dtype})
    if reason:
        raise RuntimeError(f"impl={impl!r} cannot be used here: {reason}")
    if impl == "triton" and rank > MAX_RANK[x.dtype]:
        raise ValueError(
            f"{name} must have a rank of at most {MAX_RANK[x.dtype]} in {x.dtype} for impl='triton', got {rank}"
        )
    return impl


def unsupported_reason(impl: str, device: torch.device, dtypes: Collection[torch.dtype] = ()) -> str:
    """The reason why an implementation cannot be used on a device and with these dtypes, "" where it can."""
    return dispatch.unsupported_reason(impl, device, dtypes) if impl == "triton" else ""


def check_rows(x: Tensor) -> None:
    if not isinstance(x, Tensor) or x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x must be floating point of shape [N, d], got {describe(x)}")
    if x.shape[1] == 0:
        raise ValueError(f"x must have at least one column, got {describe(x)}")


def check_parameter(name: str, parameter: Tensor | None, shape: tuple[int | None, ...], x: Tensor, says: str) -> None:
    """Raises a ValueError that names the parameter that is not of this shape, None for any size of 1 or more, or not
    floating point on x's device. says: the shape in letters.
    """
    if not isinstance(parameter, Tensor) or not parameter.is_floating_point() or parameter.dim() != len(shape):
        raise ValueError(f"{name} must be floating point of shape {says}, got {describe(parameter)}")
    if any(size == 0 or size != (expected or size) for size, expected in zip(parameter.shape, shape, strict=True)):
        sizes = ", ".join("*" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have the shape {says} = [{sizes}], got {describe(parameter)}")
    if parameter.device != x.device:
        raise ValueError(f"{name} must be on {x.device} like x, got {parameter.device}")


def check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")


def task_rates(
    name: str, dropout_p: float | Sequence[float] | None, num_tasks: int, seed: Tensor | None, device: torch.device
) -> tuple[float, ...]:
    """The probability of every task. Raises a ValueError that names the argument that is wrong."""
    if dropout_p is None:
        rates: tuple[float, ...] = (0.0,) * num_tasks
    elif isinstance(dropout_p, (int, float)):
        rates = (float(dropout_p),) * num_tasks
    elif isinstance(dropout_p, Sequence):
        rates = tuple(map(float, dropout_p))
    else:
        raise ValueError(f"{name} must be a number, one number for each task, or None, got {describe(dropout_p)}")
    if len(rates) != num_tasks:
        raise ValueError(f"{name} must be one number, or {num_tasks}, one for each task, got {len(rates)}")
    for rate in rates:
        if not 0 <= rate < 1:
            raise ValueError(f"{name} must be in [0, 1), got {rate}")
    check_dropout(max(rates), seed, device)
    return rates


@lru_cache(maxsize=64)
def dropout_table(rates: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """keep_threshold and 1 / (1 - p) of every task, int32 and float32 [T] on the device.

    Kept, as a copy from the host would wait for the device in every call and cannot be captured in a graph.
    """
    thresholds = torch.tensor([keep_threshold(rate) for rate in rates], dtype=torch.int32, device=device)
    return thresholds, torch.tensor([1 / (1 - rate) for rate in rates], dtype=torch.float32, device=device)
