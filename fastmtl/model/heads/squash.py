"""A score that stays within the label range: low + (high - low) squash(x)."""

from __future__ import annotations

from torch import Tensor, nn

from fastmtl.model.heads.features import precise
from fastmtl.model.heads.outputs import RANGE_WIDTH

SQUASHES = {"relu": Tensor.relu, "sigmoid": Tensor.sigmoid}


class Squashed(nn.Module):
    """Another head's outputs x [E, 1] as scores. relu has no upper limit: a cosine, which does, suits it better."""

    def __init__(self, head: nn.Module, squash: str) -> None:
        super().__init__()
        self.head, self.squash = head, squash

    def forward(self, u: Tensor, v: Tensor | None) -> Tensor:
        return from_unit_range(SQUASHES[self.squash](precise(self.head(u, v))))


def from_unit_range(share: Tensor) -> Tensor:
    """0 for the smallest label and 1 for the largest -> the units of a score (see outputs.py)."""
    return RANGE_WIDTH * (share - 0.5)
