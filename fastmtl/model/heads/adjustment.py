"""Learned map p C of class probabilities p, for classes that resemble their neighbours.

C [C, C] is the softmax of each row of a parameter, so that p C are probabilities again. It starts
near the identity, with 0.95 on the diagonal.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastmtl.model.heads.features import precise


class Adjusted(nn.Module):
    """Map another head's logits [E, C] to log (softmax(logits) C), which are logits as well."""

    def __init__(self, head: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.head = head
        # The name has "bias" in it to exclude the parameter from weight decay, which would pull C
        # towards equal entries.
        diagonal = math.log(0.95 / 0.05 * (num_classes - 1))
        self.row_bias = nn.Parameter(diagonal * torch.eye(num_classes))

    def forward(self, u: Tensor, v: Tensor | None) -> Tensor:
        log_p = precise(self.head(u, v)).log_softmax(dim=1)
        log_rows = precise(self.row_bias).log_softmax(dim=1)
        return (log_p[:, :, None] + log_rows).logsumexp(dim=1)
