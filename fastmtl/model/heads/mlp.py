"""Head of several layers.

Each hidden layer is dropout, a linear map and ReLU; the last layer is dropout and a linear map.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from fastmtl.config import TaskConfig
from fastmtl.errors import UserError
from fastmtl.model.heads.features import features, num_features
from fastmtl.model.heads.outputs import num_outputs


class MlpHead(nn.Module):
    def __init__(self, task: TaskConfig, hidden_size: int, std: float) -> None:
        super().__init__()
        if any(size < 1 for size in task.head.hidden):
            raise UserError(f"head.hidden: {task.head.hidden}: the sizes of hidden layers are positive")
        self.task = task
        sizes = [num_features(task, hidden_size), *(task.head.hidden or [hidden_size])]
        self.hidden = nn.ModuleList(nn.Linear(size, next_size) for size, next_size in pairwise(sizes))
        self.dropout = nn.Dropout(task.head.dropout)
        self.dense = nn.Linear(sizes[-1], num_outputs(task))
        nn.init.normal_(self.dense.weight, std=std)
        nn.init.zeros_(self.dense.bias)

    def forward(self, u: Tensor, v: Tensor | None) -> Tensor:
        x = features(self.task, u, v)
        for linear in self.hidden:
            x = linear(self.dropout(x)).relu()
        return self.dense(self.dropout(x))
