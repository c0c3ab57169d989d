"""Task type span: a softmax over the tokens of a window for each end of the answer.

The head gives [U, 2], the logits of "the answer begins here" and "the answer ends here" for every
token of a window. The loss of a window is (CE(start) + CE(end)) / 2, with both ends at the first
token if the window has no answer. It equals the loss of the question answering models in Hugging
Face's transformers.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastmtl.config import TaskConfig
from fastmtl.data.packed_batch import Units
from fastmtl.model.examples import Examples
from fastmtl.model.types.segments import segment_log_softmax, segment_sum
from fastmtl.model.types.spec import UnitLoss, UnitType


def cross_entropy(task: TaskConfig) -> UnitLoss:
    """Return the mean over both ends of - log softmax(logits)[end] of each window, [E]."""

    def loss(found: Examples, labels: Tensor, head: nn.Module) -> Tensor:
        assert found.units is not None
        log_p = segment_log_softmax(found.outputs, found.units)
        ends = found.units.offsets[:-1, None] + labels.reshape(-1, 2)
        return -log_p.gather(0, ends).mean(dim=1)

    return loss


def predictions(task: TaskConfig, found: Examples, head: nn.Module) -> Tensor:
    """Return the logits, [U, 2]. Windows of one question are compared by them, not by softmax."""
    return found.outputs


def divergence(task: TaskConfig, p: Tensor, q: Tensor, units: Units) -> Tensor:
    """Return the mean over both ends of KL(p, q) + KL(q, p), [E]."""
    log_p, log_q = (segment_log_softmax(x, units) for x in (p, q))
    return segment_sum((log_p.exp() - log_q.exp()) * (log_p - log_q), units).mean(dim=1)


SPAN = UnitType(lambda task: 2, {"cross_entropy": cross_entropy}, predictions, divergence)
