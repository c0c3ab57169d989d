"""The check of a step's first micro-batch: its task gradients are those of a pass per task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastmtl.surgery.differentiate import Term
from fastmtl.surgery.losses import Losses
from fastmtl.surgery.parts import Parts
from fastmtl.surgery.sinks.sink import Sink
from fastmtl.surgery.sinks.source import MergingSink
from fastmtl.surgery.step_losses import LossFunction, Step
from fastmtl.surgery.steps.passes import enter_pass, passes_of
from fastmtl.surgery.verify.passes import compare_backwards, compare_forwards


def verify_backward(parts: Parts, sink: MergingSink, step: Step, losses: Losses, scale: float) -> None:
    """Check the gradients that a backward with retain_graph=True has given to an empty sink.

    scale: the loss scale. Raises UserError on every rank if any rank has found a difference.
    """
    assert parts.verifier is not None
    step.verifies = False
    passes = [step.terms(losses, scale, [name]) for name in parts.tasks]
    mismatches = [] if parts.attached is None else parts.attached.output_mismatches
    parts.verifier.settle(lambda: compare_backwards(sink, passes, parts.shared, parts.target.names), mismatches)


def verify_forward(parts: Parts, step: Step, micro_batch: Any, losses_of: LossFunction) -> None:
    """Check a micro-batch before its pass, by forwards and backwards of its own.

    Raises UserError on every rank if any rank has found a difference.
    """
    target, scale = parts.target, parts.target.loss_scale()
    assert parts.verifier is not None
    step.verifies, mismatches = False, list[str]()

    def run(sink: Sink, task: int | None, number: int) -> tuple[Sequence[Term], int]:
        losses = losses_of(micro_batch, sink, verifying=task is None and not number)
        mismatches.extend([] if parts.attached is None else parts.attached.output_mismatches)
        step.check(losses)
        passes = passes_of(parts)
        enter_pass(parts, passes[number])
        return step.terms(losses, scale, passes[number] if task is None else [parts.tasks[task]]), len(passes)

    number, names = len(parts.tasks), target.names
    parts.verifier.settle(lambda: compare_forwards(run, number, parts.shared, names, target.device), mismatches)
