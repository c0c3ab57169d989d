"""A pair's score is its cosine: 0 is the smallest label, 1 the largest (Reimers & Gurevych 2019). No parameters."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from fastmtl.config import TaskConfig
from fastmtl.errors import UserError
from fastmtl.model.outputs import RANGE_WIDTH


class CosineHead(nn.Module):
    def __init__(self, task: TaskConfig, hidden_size: int, std: float) -> None:
        super().__init__()
        if task.type != "regression":
            raise UserError(f"head.name: cosine gives a score, for a regression task; this one's type is {task.type}")
        if task.pairs != "bi":
            raise UserError("head.name: cosine compares two sequences: it needs pairs: bi, not pairs: cross")
        self.dropout = nn.Dropout(task.head.dropout)

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        # fp32: the rounding of a bf16 cosine near 1 is larger than most differences between pairs
        cosine = functional.cosine_similarity(self.dropout(u).float(), self.dropout(v).float(), dim=1)
        return (RANGE_WIDTH * (cosine - 0.5))[:, None]
