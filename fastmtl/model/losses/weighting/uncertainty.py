"""Loss weight `uncertainty`: learned, one per task."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Uncertainty(nn.Module):
    """Learned weight of a task's loss: L becomes exp(-s) L + s / 2, where L is its mean loss.

    For a squared error, L becomes exp(-s) L / 2 + s / 2. s = log sigma^2 is learned, starts at 0.
    Source: Kendall, Gal and Cipolla 2018, "Multi-Task Learning Using Uncertainty to Weigh Losses",
    equations 7 and 10.
    """

    def __init__(self, *, squared_error: bool) -> None:
        super().__init__()
        self.factor = 0.5 if squared_error else 1.0
        # "bias" in the name excludes the parameter from weight decay (see groups.py), which would
        # pull the weight towards 1.
        self.log_variance_bias = nn.Parameter(torch.zeros(1))

    def forward(self, loss: Tensor, rows: int) -> Tensor:
        """Return a loss with the gradient of the weighted loss and the value of the unweighted one.

        The value is not weighted so that the losses of several runs can be compared.
        loss: 0-dim, summed over `rows` rows.
        """
        s = self.log_variance_bias.to(loss.dtype).squeeze(0)
        weighted = self.factor * (-s).exp() * loss + 0.5 * rows * s
        return weighted + (loss - weighted).detach()
