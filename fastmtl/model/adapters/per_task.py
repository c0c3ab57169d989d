"""Linear maps with one weight per task, for tokens sorted by task."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastmtl.model.context import ForwardContext
from fastmtl.surgery.segments import Segments


def per_task_linear(x: Tensor, weight: Tensor, bias: Tensor | None, segments: Segments) -> Tensor:
    """y = x W_t^T + b_t for the rows of task t.

    x: [N, in], weight: [T, out, in], bias: [T, out] or None. Returns [N, out]. An absent task's weight is not
    touched.
    """
    # unbind: its backward stacks the gradients once, where weight[t] would make T tensors of the whole weight's size
    weights = weight.unbind(0)
    biases = [None] * len(weights) if bias is None else bias.unbind(0)
    rows = x.split([stop - start for start, stop in zip(segments.host, segments.host[1:], strict=False)])
    present = [task for task, part in enumerate(rows) if part.shape[0]] or [0]
    parts = [functional.linear(rows[task], weights[task], biases[task]) for task in present]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class PerTaskLinear(nn.Module):
    """weight [T, out, in], bias [T, out]; both are zero until their owner initialises them."""

    def __init__(self, num_tasks: int, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_tasks, out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(num_tasks, out_features)) if bias else None

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        """[N, in] -> [N, out]."""
        return per_task_linear(x, self.weight, self.bias, context.segments)
