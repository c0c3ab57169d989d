"""Head whose score of a pair is the cosine of u and v (Reimers & Gurevych 2019).

It has no parameters. A cosine of 0 gives the smallest label of the range, a cosine of 1 the
largest. Negative cosines give scores below the range, unless `squash: relu` raises them to the
smallest label; `squash: sigmoid` keeps scores within the range by a smooth function.
For a binary task the score is the logit of class 1. Without squash, pairs with a cosine of at least
0.5 are therefore predicted as class 1.
For a ranking task the score is the cosine itself; ranking.scale multiplies it in the losses.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from fastmtl.config import TaskConfig
from fastmtl.errors import UserError
from fastmtl.model.heads.outputs import kind
from fastmtl.model.heads.squash import SQUASHES, from_unit_range
from fastmtl.model.precision import precise


class CosineHead(nn.Module):
    def __init__(self, task: TaskConfig, hidden_size: int, std: float) -> None:
        super().__init__()
        if task.type in ("classification", "multilabel") or kind(task) == "bins":
            what = "by cross_entropy" if task.type == "regression" else "task"
            raise UserError(f"head.name: cosine gives one number, which does not fit a {task.type} {what}")
        if task.pairs != "bi":
            raise UserError("head.name: cosine compares two sequences: it needs pairs: bi, not pairs: cross")
        self.dropout = nn.Dropout(task.head.dropout)
        self.squash = task.head.squash
        self.in_range = kind(task) != "units"

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        cosine = cosine_of(self.dropout(u), self.dropout(v))
        if not self.in_range:
            return cosine[:, None]
        return from_unit_range(SQUASHES[self.squash](cosine) if self.squash else cosine)[:, None]


def cosine_of(u: Tensor, v: Tensor) -> Tensor:
    """Return the cosine of each row of u and v [E, d]: [E], in float32 or wider."""
    return functional.cosine_similarity(precise(u), precise(v), dim=1)
