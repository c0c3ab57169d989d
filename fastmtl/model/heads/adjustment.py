"""Learned correction of a head's class probabilities, for classes that are easily confused.

The probabilities p [E, C] become p M. Each row of M [C, C] is the softmax of a row of a parameter,
so that p M are probabilities again. M starts near the identity, with 0.95 on the diagonal.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastmtl.model.precision import precise


class Adjusted(nn.Module):
    """Map another head's logits [E, C] to log(softmax(logits) M), which are logits again."""

    def __init__(self, head: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.head = head
        # "bias" in the name excludes the parameter from weight decay (see groups.py), which would
        # pull M towards equal entries.
        diagonal = math.log(0.95 / 0.05 * (num_classes - 1))
        self.row_bias = nn.Parameter(diagonal * torch.eye(num_classes))

    def forward(self, u: Tensor, v: Tensor | None) -> Tensor:
        log_p = precise(self.head(u, v)).log_softmax(dim=1)
        log_rows = precise(self.row_bias).log_softmax(dim=1)
        return (log_p[:, :, None] + log_rows).logsumexp(dim=1)
