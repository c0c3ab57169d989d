"""What of a step became CUDA graphs. A step that fell back must not be measured under their name."""

from __future__ import annotations

from fastmtl.measure.harness import Skipped
from fastmtl.model.multitask import MultiTaskModel
from fastmtl.surgery import GradientSurgery

# Encoder and merging are recorded in the first step, heads in the second, when their sizes have been seen before.
STEPS_TO_RECORD = 2


def not_recorded(model: MultiTaskModel, surgery: GradientSurgery | None = None) -> list[str]:
    """Return the reasons why encoder, heads or merging launch their operations one by one; none if all are recorded.

    Call it after STEPS_TO_RECORD steps. surgery: that of the steps, None where gradients are summed by autograd.
    """
    found = [] if surgery is None else list(surgery.not_recorded)
    for graphs in (model.encoder.graphs, model.graphs):
        found += ["engine.cuda_graphs is off"] if graphs is None else graphs.recordings.warned
    return found


def refuse_unrecorded(model: MultiTaskModel, surgery: GradientSurgery | None = None) -> None:
    """Raise Skipped with the reasons where not everything was recorded."""
    reasons = not_recorded(model, surgery)
    if reasons:
        raise Skipped("; ".join(reasons))
