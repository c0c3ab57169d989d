"""Loss weight `imtl_l`: a learned scale per task."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ImpartialScale(nn.Module):
    """Learned scale of a task's loss: L becomes exp(s) L - s, where L is its mean loss.

    s starts at 0. The scaled losses become equally large.
    Source: Liu et al. 2021, "Towards Impartial Multi-Task Learning", loss balance (IMTL-L).
    """

    def __init__(self) -> None:
        super().__init__()
        # "bias" in the name excludes the parameter from weight decay (see groups.py).
        self.log_scale_bias = nn.Parameter(torch.zeros(1))

    def forward(self, loss: Tensor, terms: int) -> Tensor:
        """Return a loss with the gradient of the scaled loss and the value of the unscaled one.

        loss: 0-dim, summed over `terms` loss terms.
        """
        s = self.log_scale_bias.to(loss.dtype).squeeze(0)
        scaled = s.exp() * loss - terms * s
        return scaled + (loss - scaled).detach()
