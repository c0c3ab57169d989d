"""Checks that a step runs as CUDA graphs. A step that fell back must not be measured as one."""

from __future__ import annotations

from fastmtl.cuda_graphs.install import not_recorded as model_not_recorded
from fastmtl.measure.harness import Skipped
from fastmtl.model.multitask import MultiTaskModel
from fastmtl.surgery import GradientSurgery

# The encoder and merging are recorded in the first step, heads in the second, once their sizes have
# occurred before.
STEPS_TO_RECORD = 2


def not_recorded(model: MultiTaskModel, surgery: GradientSurgery | None = None) -> list[str]:
    """Return the reasons why encoder, heads or merging run without CUDA graphs; [] for none.

    Call this after STEPS_TO_RECORD steps. surgery: that of the steps; None if autograd sums the
    gradients.
    """
    found = [] if surgery is None else list(surgery.not_recorded)
    return found + model_not_recorded(model)


def refuse_unrecorded(model: MultiTaskModel, surgery: GradientSurgery | None = None) -> None:
    """Raise Skipped with the reasons unless everything was recorded."""
    reasons = not_recorded(model, surgery)
    if reasons:
        raise Skipped("; ".join(reasons))
