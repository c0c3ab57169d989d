"""Settings and checks of one or two linear maps per task, shared by low_rank, lora and pal."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastmtl_kernels.checks import check_dropout, describe
from fastmtl_kernels.dispatch import DTYPES
from fastmtl_kernels.philox import keep_threshold
from fastmtl_kernels.task_sink import TaskRows

Impl = Literal["auto", "reference", "torch", "triton"]
Activation = Literal["identity", "gelu", "relu"]
ACTIVATIONS = ("identity", "gelu", "relu")


class Maps(NamedTuple):
    """The settings of one call that are not tensors, for forward and backward.

    kernels: the module of the implementation, None for the reference. middle, last: activations
    after the first and the second map. rates: the probability of dropout of each task; without a
    seed nothing is dropped. saves: whether forward keeps tensors for a backward.
    """

    kernels: ModuleType | None
    tasks: TaskRows
    middle: str
    last: str
    rates: tuple[float, ...]
    saves: bool


class Wants(NamedTuple):
    """Flags of the inputs whose gradient autograd needs."""

    x: bool
    first: bool
    first_bias: bool
    second: bool
    second_bias: bool


def to_autocast(x: Tensor) -> Tensor:
    """Return x; if autocast is on, converted to autocast's dtype, as torch's linear layers do."""
    if x.dtype in DTYPES and torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def check_rows(x: Tensor) -> None:
    """Raise ValueError unless x is floating point [N, d] with d >= 1."""
    if not isinstance(x, Tensor) or x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x must be floating point of shape [N, d], got {describe(x)}")
    if x.shape[1] == 0:
        raise ValueError(f"x must have at least one column, got {describe(x)}")


def check_parameter(name: str, parameter: Tensor | None, shape: tuple[int | None, ...], x: Tensor, says: str) -> None:
    """Raise ValueError unless a parameter is floating point of the shape `shape` on x's device.

    shape: None stands for any size of 1 or more. says: the shape in letters ("[T, d, r]"), for the
    message. name: the name of the parameter, for the message.
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
    """Return the probability of dropout of each of the T tasks.

    dropout_p: one number for all tasks, one per task, or None for 0. name: its name for the message
    of the ValueError, which is raised for a wrong probability or seed.
    """
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
    """Return keep_threshold(p) and 1 / (1 - p) of every task, int32 and float32 [T] on the device.

    The result is cached: a copy from the host would wait for the device in every call, and cannot
    be captured in a CUDA graph.
    """
    thresholds = torch.tensor([keep_threshold(rate) for rate in rates], dtype=torch.int32, device=device)
    return thresholds, torch.tensor([1 / (1 - rate) for rate in rates], dtype=torch.float32, device=device)
