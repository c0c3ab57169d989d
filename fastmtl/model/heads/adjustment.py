"""Probabilities p of classes that resemble their neighbours, mapped by a learned matrix: p C.

C [C, C] is learned as the softmax of each of its rows, so that p C are probabilities again. It starts near the
identity: 0.95 on the diagonal.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastmtl.model.heads.features import precise


class Adjusted(nn.Module):
    """Another head's logits [E, C] -> log (softmax(logits) C), which are logits as well."""

    def __init__(self, head: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.head = head
        # Called a bias so that weight decay leaves it alone: it would pull C towards equal entries.
        diagonal = math.log(0.95 / 0.05 * (num_classes - 1))
        self.row_bias = nn.Parameter(diagonal * torch.eye(num_classes))

    def forward(self, u: Tensor, v: Tensor | None) -> Tensor:
        log_p = precise(self.head(u, v)).log_softmax(dim=1)
        log_rows = precise(self.row_bias).log_softmax(dim=1)
        return (log_p[:, :, None] + log_rows).logsumexp(dim=1)
