"""Scores within the label range: low + (high - low) squash(x)."""

from __future__ import annotations

from torch import Tensor, nn

from fastmtl.model.heads.features import precise
from fastmtl.model.heads.outputs import RANGE_WIDTH

SQUASHES = {"relu": Tensor.relu, "sigmoid": Tensor.sigmoid}


class Squashed(nn.Module):
    """Map another head's outputs x [E, 1] to scores.

    relu has no upper limit, so it suits a cosine, which has one.
    """

    def __init__(self, head: nn.Module, squash: str) -> None:
        super().__init__()
        self.head, self.squash = head, squash

    def forward(self, u: Tensor, v: Tensor | None) -> Tensor:
        return from_unit_range(SQUASHES[self.squash](precise(self.head(u, v))))


def from_unit_range(share: Tensor) -> Tensor:
    """Map 0 (the smallest label) to 1 (the largest) to the units of a score (see outputs.py)."""
    return RANGE_WIDTH * (share - 0.5)
