"""A step with `storage: stacked` or `kept`: `StackedStep.run`, `backward` and `finish`. In short:

losses = model(batch, sink)                    one forward for all tasks
sink.backward(losses)                          the sink takes the task gradients
weights = method(sink.gramian())               T weights from the T x T Gramian
target.hand_over(sink.combine(weights))        one merged gradient
engine.step()                                  called by the training loop
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from fastmtl.measure.ranges import profile_range
from fastmtl.surgery.clipping import clip_gradients, known_clip, over_ranks, shared_norm
from fastmtl.surgery.info import SurgeryInfo
from fastmtl.surgery.losses import Losses
from fastmtl.surgery.merged import Merged
from fastmtl.surgery.methods.method import Method
from fastmtl.surgery.parts import Parts
from fastmtl.surgery.sinks.sink import Sink
from fastmtl.surgery.sinks.source import MergingSink
from fastmtl.surgery.sinks.stack import StackSink
from fastmtl.surgery.step_losses import LossFunction, Step
from fastmtl.surgery.steps.passes import enter_pass, losses_of_passes
from fastmtl.surgery.steps.per_task import backward_per_task
from fastmtl.surgery.steps.verified import verify_backward
from fastmtl.surgery.stopwatch import Stopwatch
from fastmtl.surgery.targets.adamw import TaskUpdate
from fastmtl.surgery.targets.protocol import Target
from fastmtl_kernels.cast import cast

_Value = TypeVar("_Value")


class RecordedMerging(Protocol):
    """Gramian, weights and merging as one recording that the host launches with one call.

    gram: float32 [T, T], G of the last `run`. weights: [T], the method's weights for `gram`.
    """

    gram: Tensor
    weights: Tensor

    def run(self, order: Tensor, scale: float, factor: float) -> None:
        """Compute a step's G, weights and merged gradient.

        order: projection order, int64 [T, T] on the CPU. scale: the loss scale that J contains.
        factor: multiplies the merged gradient.
        """
        ...

    def scale(self, factor: float) -> None:
        """Multiply the merged gradient by `factor`, which is NaN after an overflow."""
        ...

    def gradients(self) -> Merged:
        """Return the merged gradient of each parameter, by id."""
        ...

    def tensors(self) -> list[Tensor]:
        """Return the tensors that are kept from step to step, without J."""
        ...


class RecordMerging(Protocol):
    """Function that records merging, such as `fastmtl.cuda_graphs.record_merging`."""

    def __call__(
        self, sink: Sink, method: Method, target: Target, storage: str
    ) -> tuple[RecordedMerging | None, Sequence[str]]:
        """Return a recording for all steps of `sink`, and the reasons why steps are not recorded.

        The recording is None if merging cannot be recorded. The list of reasons grows during the
        run.
        """
        ...


class StackedStep:
    """One optimizer step. recorded: computes G, weights and merging in `finish`, if given."""

    def __init__(self, parts: Parts, sink: MergingSink, step: Step, recorded: RecordedMerging | None = None) -> None:
        self._parts, self._sink, self._step, self._recorded = parts, sink, step, recorded
        self._scale = parts.target.loss_scale()
        sink.clear()
        sink.start_sketch(parts.solver.step_seed, parts.target.device)
        self._own: list[Tensor | None] = [None] * len(parts.own)

    def run(self, micro_batches: Sequence[Any], losses_of: LossFunction) -> SurgeryInfo:
        """Run all micro-batches, give the target one merged gradient, and return the report."""
        for number, micro_batch in enumerate(micro_batches, start=1):
            with self._sink.armed(self._parts.target.device):
                with profile_range("forward"):
                    losses = losses_of(micro_batch, self._sink, verifying=self._step.verifies)
                self.backward(losses, takes_sink=losses_of.takes_sink, last=number == len(micro_batches))
                # A live autograd graph would bring the default stream into the next CUDA graph.
                del losses
        return self.finish()

    def backward(self, losses: Losses, *, takes_sink: bool, last: bool) -> None:
        """Run backward for one micro-batch, whose forward ran while the sink was armed."""
        parts, sink, step = self._parts, self._sink, self._step
        parts.target.check_forward()
        step.take(losses)
        with profile_range("backward"):
            if takes_sink:
                verifies, passes = step.verifies, losses_of_passes(parts, losses)
                for k, (tasks, of_pass) in enumerate(passes, start=1):
                    last_pass = k == len(passes)
                    enter_pass(parts, tasks)
                    # The ranks' decision is a collective, which pieces of J under way would precede
                    # on some ranks and follow on others.
                    sink.forward_done(last=last and last_pass and not verifies)
                    terms, names = step.terms(of_pass, self._scale), parts.target.names
                    retain = verifies or not last_pass
                    self._add_own(sink.backward(terms, parts.shared, parts.own, names, retain_graph=retain))
                if verifies:
                    verify_backward(parts, sink, step, losses, self._scale)
            else:
                assert isinstance(sink, StackSink), "storage: kept needs layers that write into the sink"
                factor = self._factor_of
                backward_per_task(parts, sink, losses, factor, self._add_own, self._reach_own)

    def finish(self) -> SurgeryInfo:
        """Solve for the weights, merge the task gradients and hand the result to the target."""
        parts, sink = self._parts, self._sink
        watch = Stopwatch(parts.target.device)
        with profile_range("surgery"):
            own, reached = self._own_gradients()
            if self._recorded is None:
                gram = sink.gramian() / self._scale**2
                info, weights = parts.solver.solve(gram, self._step, parts.target, *self._own_to_check(own))
                merged, norm = self._combine(info, weights, own, reached)
            else:
                info, merged, norm = self._replay(self._recorded, own)
            nbytes = sink.nbytes()
            if info.skipped is not None:
                sink.clear()  # else kept pairs would stay in memory during the next forward
            if merged is not None:
                info = self._clip(info, merged, norm, own)
        watch.stop()
        if merged is not None:
            with profile_range("communication"):
                parts.target.hand_over(merged, parts.target.sum_over_ranks(merged, reached))
        return dataclasses.replace(info, nbytes=nbytes, stopwatch=watch)

    @property
    def _factor(self) -> float:
        """The factor that turns gradients with loss scale into those that the target takes."""
        return self._parts.target.factor / self._scale

    def _own_gradients(self) -> tuple[list[Tensor], set[int]]:
        """Return float32 gradients of all own parameters, and ids of the parameters that a loss has
        reached, shared ones too.

        An unreached own parameter has zeros, so that every rank has a gradient for the same ones.
        """
        pairs = list(zip(self._parts.own, self._own, strict=True))
        reached = self._sink.reached() | {id(p) for p, gradient in pairs if gradient is not None}
        own = [torch.zeros_like(p, dtype=torch.float32) if gradient is None else gradient for p, gradient in pairs]
        return own, reached

    def _combine(
        self, info: SurgeryInfo, weights: Tensor, own: list[Tensor], reached: set[int]
    ) -> tuple[Merged | None, float | None]:
        """Return the merged gradient, and its norm before clipping.

        The gradient is None for a skipped step, and if the optimizer merges itself. The norm is
        None if it is unknown; if it is known, the gradient is clipped already.
        """
        parts, sink = self._parts, self._sink
        if info.skipped is not None:
            return None, None
        norm = None if sink.sketches else shared_norm(info)
        optimizer = parts.target.merging_optimizer(norm) if isinstance(sink, StackSink) else None
        if optimizer is None or not isinstance(sink, StackSink):
            clip = known_clip(info, norm, parts.max_norm)
            scaled = weights * (self._factor if clip is None else self._factor * clip)
            return sink.combine(scaled, narrow=not parts.target.wants_float32()), norm
        own_by_id = dict(zip(map(id, parts.own), own, strict=True))  # as they are: no loss scale, one process
        dense, tables = sink.unmerged(weights)
        gradients = _select(dense, reached), _select(tables, reached), _select(own_by_id, reached)
        optimizer.take(TaskUpdate(weights, *gradients, norm or 0.0))
        return None, None

    def _replay(self, recorded: RecordedMerging, own: list[Tensor]) -> tuple[SurgeryInfo, Merged | None, float | None]:
        """Solve and merge by the recording; return the report, and the two results of `_combine`.

        The recording also merges in a skipped step, whose result is unused.
        """
        parts = self._parts
        recorded.run(parts.solver.order(), self._scale, self._factor)
        gram, weights = recorded.gram, recorded.weights
        info, overflow = parts.solver.report(gram, weights, self._step, parts.target, *self._own_to_check(own))
        if info.skipped is not None:
            return info, None, None
        norm = shared_norm(info)
        clip = float("nan") if overflow else known_clip(info, norm, parts.max_norm)
        if clip is not None and clip != 1.0:
            recorded.scale(clip)
        return info, recorded.gradients(), norm

    def _clip(self, info: SurgeryInfo, merged: Merged, norm: float | None, own: list[Tensor]) -> SurgeryInfo:
        """Clip `merged` if `norm` is None, add the clipped own gradients, and return the report."""
        parts = self._parts
        info, clip = clip_gradients(info, norm, parts.max_norm, merged, parts.target.factor)
        if own:
            merged.update(zip(map(id, parts.own), torch._foreach_mul(own, self._factor * clip), strict=True))
        return info

    def _own_to_check(self, own: list[Tensor]) -> tuple[list[Tensor], list[str], float | None]:
        """Return the last three arguments of Solver.report: own gradients, their names, a scale."""
        parts = self._parts
        names = [parts.target.names[id(p)] for p in parts.own]
        return (own, names, None) if parts.max_norm is None else (over_ranks(own), names, self._scale)

    def _factor_of(self, name: str) -> float:
        return self._step.factor(name) * self._scale

    def _add_own(self, gradients: Sequence[Tensor | None]) -> None:
        for k, (total, gradient) in enumerate(zip(self._own, gradients, strict=True)):
            if gradient is not None:  # not in place: autograd may return one tensor for two parameters
                self._own[k] = cast(gradient, torch.float32) if total is None else total + gradient

    def _reach_own(self, leaves: set[int]) -> None:
        for k, parameter in enumerate(self._parts.own):
            if id(parameter) in leaves and self._own[k] is None:
                self._own[k] = torch.zeros_like(parameter, dtype=torch.float32)


def _select(by_id: Mapping[int, _Value], reached: Collection[int]) -> dict[int, _Value]:
    return {key: value for key, value in by_id.items() if key in reached}
