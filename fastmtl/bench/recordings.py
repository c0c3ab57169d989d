"""Checks that a step runs as CUDA graphs: one that fell back to eager code is not measured."""

from __future__ import annotations

from fastmtl.cuda_graphs.install import not_recorded as model_not_recorded
from fastmtl.measure.harness import Skipped
from fastmtl.model.multitask import MultiTaskModel
from fastmtl.surgery import GradientSurgery

# After this many steps everything is recorded: the first step records the encoder and merging, the
# second one the heads, since a head's sizes must have occurred before.
STEPS_TO_RECORD = 2


def not_recorded(model: MultiTaskModel, surgery: GradientSurgery | None = None) -> list[str]:
    """Return why encoder, heads or merging run without CUDA graphs; [] if all are recorded.

    Call this after STEPS_TO_RECORD steps. surgery: the object that the steps use; None if autograd
    sums the gradients.
    """
    found = [] if surgery is None else list(surgery.not_recorded)
    return found + model_not_recorded(model)


def refuse_unrecorded(model: MultiTaskModel, surgery: GradientSurgery | None = None) -> None:
    """Raise Skipped, with the reasons, unless encoder, heads and merging are recorded."""
    reasons = not_recorded(model, surgery)
    if reasons:
        raise Skipped("; ".join(reasons))
