"""Head of one linear layer."""

from __future__ import annotations

from torch import Tensor, nn

from fastmtl.config import TaskConfig
from fastmtl.model.heads.features import features, num_features
from fastmtl.model.heads.outputs import num_outputs


class LinearHead(nn.Module):
    """W dropout(x) + b, where x are the example's features (features.py)."""

    def __init__(self, task: TaskConfig, hidden_size: int, std: float) -> None:
        super().__init__()
        self.task = task
        self.dropout = nn.Dropout(task.head.dropout)
        self.dense = nn.Linear(num_features(task, hidden_size), num_outputs(task))
        nn.init.normal_(self.dense.weight, std=std)
        nn.init.zeros_(self.dense.bias)

    def forward(self, u: Tensor, v: Tensor | None) -> Tensor:
        return self.dense(self.dropout(features(self.task, u, v)))
