"""Head that limits scores to the label range: low + (high - low) squash(x)."""

from __future__ import annotations

from torch import Tensor, nn

from fastmtl.model.heads.outputs import RANGE_WIDTH
from fastmtl.model.precision import precise

SQUASHES = {"relu": Tensor.relu, "sigmoid": Tensor.sigmoid}


class Squashed(nn.Module):
    """Map another head's outputs x [E, 1] to scores [E, 1] (outputs.py).

    squash: "sigmoid", or "relu". relu limits scores below only; above it suits outputs that have a
    limit of their own, such as a cosine.
    """

    def __init__(self, head: nn.Module, squash: str) -> None:
        super().__init__()
        self.head, self.squash = head, squash

    def forward(self, u: Tensor, v: Tensor | None) -> Tensor:
        return from_unit_range(SQUASHES[self.squash](precise(self.head(u, v))))


def from_unit_range(share: Tensor) -> Tensor:
    """Map a position in the label range, 0 (lowest) to 1 (highest), to a score (outputs.py)."""
    return RANGE_WIDTH * (share - 0.5)
