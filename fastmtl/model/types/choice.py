"""Task type choice: a softmax over the scores of an example's texts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmtl.config import TaskConfig
from fastmtl.data.packed_batch import Units
from fastmtl.model.examples import Examples
from fastmtl.model.types.segments import segment_divergence, segment_log_softmax, segment_sum
from fastmtl.model.types.spec import UnitLoss, UnitType


def cross_entropy(task: TaskConfig) -> UnitLoss:
    """Return the cross-entropy of each example, [E].

    It is (1 - e) (- log p[right]) + e / K sum_k (- log p[k]) for K texts, e the label_smoothing.
    """
    smoothing = task.label_smoothing

    def loss(found: Examples, labels: Tensor, head: nn.Module) -> Tensor:
        units, log_p = _log_probabilities(found)
        losses = -log_p[units.offsets[:-1] + labels]
        if smoothing:
            losses = (1 - smoothing) * losses - smoothing * segment_sum(log_p, units) / units.offsets.diff()
        return losses

    return loss


def focal(task: TaskConfig) -> UnitLoss:
    """Return (1 - p[right])^g (- log p[right]) of each example, [E], with g the focal_gamma."""
    gamma = task.focal_gamma

    def loss(found: Examples, labels: Tensor, head: nn.Module) -> Tensor:
        units, log_p = _log_probabilities(found)
        right = log_p[units.offsets[:-1] + labels]
        # p may be rounded to 1, where a power below 1 has no finite derivative.
        return -((-right.expm1()).clamp(min=torch.finfo(right.dtype).tiny) ** gamma) * right

    return loss


def _log_probabilities(found: Examples) -> tuple[Units, Tensor]:
    assert found.units is not None
    return found.units, segment_log_softmax(found.outputs.squeeze(1), found.units)


def predictions(task: TaskConfig, found: Examples, head: nn.Module) -> Tensor:
    """Return the probability of each text, [U]."""
    return _log_probabilities(found)[1].exp()


def divergence(task: TaskConfig, p: Tensor, q: Tensor, units: Units) -> Tensor:
    """Return KL(p, q) + KL(q, p) of the softmax over each example's texts, [E]."""
    return segment_divergence(p.squeeze(1), q.squeeze(1), units)


CHOICE = UnitType(lambda task: 1, {"cross_entropy": cross_entropy, "focal": focal}, predictions, divergence)
