"""Task type tokens: a softmax over the tags of each word, or a CRF over the tags of a sentence.

Predictions are [U, 1 + C]: the id of each unit's tag, then the probabilities of all tags. The tag
is the most probable one; of a CRF it is that of the most probable sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmtl.config import TaskConfig
from fastmtl.data.packed_batch import Units
from fastmtl.data.tags import allowed
from fastmtl.errors import UserError
from fastmtl.model.examples import Examples
from fastmtl.model.losses import class_losses
from fastmtl.model.types.crf import Crf
from fastmtl.model.types.spec import UnitLoss, UnitType

IGNORED = -100  # the label of a word without one


def cross_entropy(task: TaskConfig) -> UnitLoss:
    """Return - log softmax(logits)[tag] of each unit, [U], 0 for a word without a label."""
    function = class_losses.cross_entropy(task, ignored=IGNORED)
    return lambda found, labels, head: function(found.outputs, labels)


def focal(task: TaskConfig) -> UnitLoss:
    """Return the focal loss of each unit, [U], 0 for a word without a label."""
    function = class_losses.focal(task, ignored=IGNORED)
    return lambda found, labels, head: function(found.outputs, labels)


def crf(task: TaskConfig) -> UnitLoss:
    """Return - log p(tags) of each example's sequence of tags, [E]; see crf.py."""

    def loss(found: Examples, labels: Tensor, head: nn.Module) -> Tensor:
        return head.get_submodule("crf")(found.outputs, found.units, labels)

    return loss


def add_parts(task: TaskConfig, head: nn.Module) -> None:
    """Add the submodule `crf` for the loss crf."""
    if "crf" in task.losses:
        head.crf = Crf(task.num_labels or 0, allowed(task))


def predictions(task: TaskConfig, found: Examples, head: nn.Module) -> Tensor:
    """Return the id of each unit's predicted tag and the probabilities of its tags, [U, 1 + C]."""
    if "crf" in task.losses:
        return head.get_submodule("crf")(found.outputs, found.units)
    p = found.outputs.softmax(dim=1)
    return torch.cat([p.argmax(dim=1, keepdim=True).to(p.dtype), p], dim=1)


def divergence(task: TaskConfig, p: Tensor, q: Tensor, units: Units) -> Tensor:
    """Return KL(p, q) + KL(q, p) of each unit, [U]. Raises UserError for the loss crf."""
    if "crf" in task.losses:
        raise UserError(
            "smart compares the tags of single words, and the loss crf rates whole sentences: leave one out"
        )
    log_p, log_q = p.log_softmax(1), q.log_softmax(1)
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(1)


TOKENS = UnitType(
    lambda task: task.num_labels or 0,
    {"cross_entropy": cross_entropy, "focal": focal, "crf": crf},
    predictions,
    divergence,
    add_parts,
)
