"""`storage: replay`: the first pass computes only G, the second one the merged gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from fastmtl.errors import UserError
from fastmtl.measure.ranges import profile_range
from fastmtl.surgery.clipping import shared_norm
from fastmtl.surgery.info import SurgeryInfo
from fastmtl.surgery.parts import Parts
from fastmtl.surgery.random_state import RandomState
from fastmtl.surgery.sinks.gramian import GramianSink
from fastmtl.surgery.sinks.weighted import WeightedSink
from fastmtl.surgery.step_losses import LossFunction, Step
from fastmtl.surgery.steps.passes import enter_pass, passes_of
from fastmtl.surgery.steps.verified import verify_forward
from fastmtl.surgery.stopwatch import Stopwatch


def replay(
    parts: Parts, sink: GramianSink, step: Step, micro_batches: Sequence[Any], losses_of: LossFunction
) -> SurgeryInfo:
    """Run one optimizer step in two passes and return its report.

    In the second backward, each row is multiplied by the weight of its task. With rows of several
    tasks, both passes are repeated for each set of tasks without common rows. Raises UserError for
    a model whose modules do not write into the sink.
    """
    if not losses_of.takes_sink:
        raise UserError(
            "storage='replay' (ZeRO 3, offload) needs one backward pass for all tasks: give the trunk in "
            "GradientSurgery(..., model=...), or use ZeRO 0 to 2 without offload"
        )
    target = parts.target
    watch = Stopwatch(target.device)
    scale = target.loss_scale()
    sink.clear()
    sink.start_sketch(parts.solver.step_seed, target.device)
    measures = step.verifies and target.sharded and all(parameter.grad is None for parameter in parts.shared)
    if step.verifies:
        verify_forward(parts, step, micro_batches[0], losses_of)
    passes: list[tuple[Any, RandomState, list[str]]] = []  # micro-batch, state before it, tasks
    for micro_batch in micro_batches:
        state = RandomState.capture(target.device)
        done, tasks_of_passes = 0, [parts.tasks]
        while done < len(tasks_of_passes):
            if done:  # ZeRO 3 allows one backward for each forward
                state.restore()
            with sink.armed(target.device, accumulates=len(micro_batches) > 1 or done > 0):
                with profile_range("forward"):
                    losses = losses_of(micro_batch, sink)
                if not done:
                    step.take(losses)
                    tasks_of_passes = passes_of(parts)
                    sink.accumulates = sink.accumulates or len(tasks_of_passes) > 1
                tasks, several = tasks_of_passes[done], len(tasks_of_passes) > 1
                enter_pass(parts, tasks)
                sink.tasks_of_pass = [parts.tasks.index(name) for name in tasks] if several else None
                sink.forward_done()
                with profile_range("backward"):
                    # The other losses stay, with factor 0: all ranks run the same modules.
                    sink.backward(step.terms(losses, scale, tasks), parts.shared, (), target.names)
            passes.append((micro_batch, state, tasks))
            done += 1
    after = RandomState.capture(target.device)
    with profile_range("surgery"):
        info, weights = parts.solver.solve(sink.gramian() / scale**2, step, target)
    info = dataclasses.replace(info, nbytes=sink.nbytes(), stopwatch=watch.stop())
    sink.clear()
    if info.skipped is not None:
        return info
    tables = [parameter for parameter in parts.shared if sink.is_sparse(parameter)]
    weighted = WeightedSink(parts.shared, len(parts.tasks), weights, sparse=tables)
    with parts.flag_nonfinite_own() as bad_own:
        for number, (micro_batch, state, tasks) in enumerate(passes, start=1):
            state.restore()  # the second pass needs the dropout masks of the first
            with weighted.armed(target.device):
                with profile_range("forward"):
                    losses = losses_of(micro_batch, weighted, training_pass=True)
                enter_pass(parts, tasks)
                weighted.forward_done()
                with profile_range("backward"):
                    target.backward(step.total(losses, tasks), last=number == len(passes))
    after.restore()
    parts.check_own(bad_own)
    norm = shared_norm(info)
    if measures and norm is not None and not sink.sketches:
        target.check_norm(parts.shared, norm)
    return info
