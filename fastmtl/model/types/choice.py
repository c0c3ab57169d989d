"""Task type choice: a softmax over the scores of an example's texts."""

from __future__ import annotations

from torch import Tensor, nn

from fastmtl.config import TaskConfig
from fastmtl.data.packed_batch import Units
from fastmtl.model.heads.batch import Examples
from fastmtl.model.types.segments import segment_divergence, segment_log_softmax
from fastmtl.model.types.spec import UnitLoss, UnitType


def cross_entropy(task: TaskConfig) -> UnitLoss:
    """Return - log softmax(scores)[right text] of each example, [E]."""

    def loss(found: Examples, labels: Tensor, head: nn.Module) -> Tensor:
        assert found.units is not None
        log_p = segment_log_softmax(found.outputs.squeeze(1), found.units)
        return -log_p[found.units.offsets[:-1] + labels]

    return loss


def predictions(task: TaskConfig, found: Examples, head: nn.Module) -> Tensor:
    """Return the probability of each text, [U]."""
    assert found.units is not None
    return segment_log_softmax(found.outputs.squeeze(1), found.units).exp()


def divergence(task: TaskConfig, p: Tensor, q: Tensor, units: Units) -> Tensor:
    """Return KL(p, q) + KL(q, p) of the softmax over each example's texts, [E]."""
    return segment_divergence(p.squeeze(1), q.squeeze(1), units)


CHOICE = UnitType(lambda task: 1, {"cross_entropy": cross_entropy}, predictions, divergence)
