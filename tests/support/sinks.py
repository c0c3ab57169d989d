"""Sinks by their treatment of task gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from fastmtl.surgery.sinks.gramian import GramianSink
from fastmtl.surgery.sinks.keep import KeepSink
from fastmtl.surgery.sinks.stack import StackSink
from fastmtl.surgery.sinks.tensor import Solve, TensorSink
from fastmtl.surgery.sinks.weighted import WeightedSink

Mode = Literal["stack", "keep", "gramian", "weighted", "tensor"]


def sink_of(
    mode: Mode,
    parameters: Sequence[nn.Parameter],
    num_tasks: int,
    *,
    weights: Tensor | None = None,
    solve: Solve | None = None,
    **options: Any,
) -> Any:
    """Return a sink. weights: for "weighted". solve: for "tensor". options: of the class."""
    if mode == "weighted":
        assert weights is not None
        return WeightedSink(parameters, num_tasks, weights, **options)
    if mode == "tensor":
        return TensorSink(parameters, num_tasks, solve=solve, **options)
    kinds: dict[str, Any] = {"stack": StackSink, "keep": KeepSink, "gramian": GramianSink}
    return kinds[mode](parameters, num_tasks, **options)
