"""Settings that forward and backward of add_layer_norm and embed_layer_norm share."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from fastmtl_kernels.task_sink import TaskRows, TaskSink

# Called with a result and a function that recomputes it, bit for bit, from tensors that backward
# needs anyway.
Register = Callable[[Tensor, Callable[[], Tensor]], None]


class RowNorm(NamedTuple):
    """Settings that forward and backward share, besides tensors.

    kernels: the module of the implementation. saves: whether a backward may come. sums_dtype: dtype
    of the parameters' gradients without a sink; an implementation may return float32 instead.
    """

    kernels: ModuleType
    dropout_p: float
    eps: float
    tasks: TaskRows
    sink: TaskSink | None
    saves: bool
    sums_dtype: torch.dtype = torch.float32
    register: Register | None = None
