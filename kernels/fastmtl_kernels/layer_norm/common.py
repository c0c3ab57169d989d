"""Settings of a call of add_layer_norm or embed_layer_norm, for its forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from fastmtl_kernels.task_sink import TaskRows, TaskSink

# Called with a result and a function that recomputes the result, bit for bit. That function keeps
# only tensors that backward needs anyway.
Register = Callable[[Tensor, Callable[[], Tensor]], None]


class RowNorm(NamedTuple):
    """The settings of one call that are not tensors, for forward and backward.

    kernels: the module of the implementation. saves: whether forward keeps tensors for a backward.
    sums_dtype: dtype of the gradients of weight and bias if there is no sink; an implementation may
    return float32 instead. returns_sum: whether z is a result as well.
    """

    kernels: ModuleType
    dropout_p: float
    eps: float
    tasks: TaskRows
    sink: TaskSink | None
    saves: bool
    sums_dtype: torch.dtype = torch.float32
    register: Register | None = None
    returns_sum: bool = False
