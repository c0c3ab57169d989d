"""Head of one linear layer on a pair's features x, plus the cosine: W x + b + cos(u, v)."""

from __future__ import annotations

from torch import Tensor

from fastmtl.config import TaskConfig
from fastmtl.errors import UserError
from fastmtl.model.heads.cosine import cosine_of
from fastmtl.model.heads.linear import LinearHead
from fastmtl.model.heads.outputs import num_outputs
from fastmtl.model.precision import precise


class LinearCosineHead(LinearHead):
    def __init__(self, task: TaskConfig, hidden_size: int, std: float) -> None:
        if task.pairs != "bi":
            raise UserError("head.name: linear_cosine compares two sequences: it needs pairs: bi, not pairs: cross")
        if num_outputs(task) != 1:
            raise UserError(
                "head.name: linear_cosine gives one number: it fits binary tasks, ranking, and regression by mse"
            )
        super().__init__(task, hidden_size, std)

    def forward(self, u: Tensor, v: Tensor | None) -> Tensor:
        assert v is not None
        return precise(super().forward(u, v)) + cosine_of(u, v)[:, None]
