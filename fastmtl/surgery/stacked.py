"""`storage: stacked` and `kept`: one backward for each micro-batch, and the merged gradient is handed to the target."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from fastmtl.cuda_graphs.merging import RecordedStep
from fastmtl.measure.ranges import profile_range
from fastmtl.surgery.clipping import clip_gradients, known_clip, over_ranks, shared_norm
from fastmtl.surgery.differentiate import differentiate, leaves_of
from fastmtl.surgery.losses import Losses
from fastmtl.surgery.merged import Merged
from fastmtl.surgery.parts import Parts
from fastmtl.surgery.step import Step, SurgeryInfo
from fastmtl.surgery.stopwatch import Stopwatch
from fastmtl.surgery.targets.adamw import TaskUpdate
from fastmtl_kernels.cast import cast

log = logging.getLogger(__name__)

# What a step tells, the merged gradients of shared parameters by id, None where there are none to hand over, and their
# norm where it is known: then they are clipped.
_Merged = tuple[SurgeryInfo, Merged | None, float | None]

_Value = TypeVar("_Value")


class StackedStep:
    """One step: `take` each micro-batch's losses, made while the sink was armed, then `finish`.

    recorded: what merges, None for launching each operation.
    """

    def __init__(self, parts: Parts, step: Step, recorded: RecordedStep | None = None) -> None:
        self._parts, self._step, self._recorded = parts, step, recorded
        parts.target.begin()
        self._scale = parts.target.loss_scale()
        parts.sink.clear()
        parts.sink.start_sketch(parts.solver.step_seed, parts.target.device)
        self._own: list[Tensor | None] = [None] * len(parts.own)

    def take(self, losses: Losses, *, takes_sink: bool, last: bool) -> None:
        self._parts.target.check_forward()
        self._step.take(losses)
        with profile_range("backward"):
            if takes_sink:
                self._parts.sink.forward_done(last=last)
                self._add_own(self._parts.one_pass(self._step.terms(losses, self._scale), self._parts.own))
            else:
                self._one_by_one(losses)

    def _one_by_one(self, losses: Losses) -> None:
        """The textbook way, for a model that is not made of fastmtl's layers: one backward per task."""
        sink, shared = self._parts.sink, self._parts.shared
        names = self._parts.target.names
        for t, name in enumerate(self._parts.tasks):
            if name not in losses:
                continue
            if losses[name][1] == 0:  # its zero reaches what it depends on: joint training gives that a zero, too
                self._reach(leaves_of(losses[name][0]))
                continue
            term = losses[name][0], self._step.factor(name) * self._scale
            gradients = differentiate([term], [*shared, *self._parts.own], names, again=True)
            for parameter, gradient in zip(shared, gradients, strict=False):
                if gradient is None:
                    continue
                if sink.is_sparse(parameter):
                    ids = gradient.abs().sum(1).nonzero().squeeze(1)
                    sink.add_rows(parameter, t, ids, gradient[ids])
                else:
                    sink.stack_of(parameter).add_task(parameter, t, gradient)
            self._add_own(gradients[len(shared) :])

    def _reach(self, leaves: set[int]) -> None:
        for parameter in self._parts.shared:
            if id(parameter) in leaves:
                self._parts.sink.reach(parameter)
        for k, parameter in enumerate(self._parts.own):
            if id(parameter) in leaves and self._own[k] is None:
                self._own[k] = torch.zeros_like(parameter, dtype=torch.float32)

    def _add_own(self, gradients: Sequence[Tensor | None]) -> None:
        for k, (total, gradient) in enumerate(zip(self._own, gradients, strict=True)):
            if gradient is not None:  # not in place: autograd may have given one tensor for two parameters
                self._own[k] = cast(gradient, torch.float32) if total is None else total + gradient

    def finish(self) -> SurgeryInfo:
        parts = self._parts
        watch = Stopwatch(parts.target.device)
        with profile_range("surgery"):
            names = [parts.target.names[id(p)] for p in parts.own]
            own = [
                torch.zeros_like(p, dtype=torch.float32) if gradient is None else gradient
                for p, gradient in zip(parts.own, self._own, strict=True)
            ]
            # Every rank has the same tensors here; what no loss has reached is left out by targets that can.
            reached = parts.sink.reached()
            reached |= {id(p) for p, gradient in zip(parts.own, self._own, strict=True) if gradient is not None}
            factor = parts.target.factor / self._scale
            watched = own if parts.max_norm is None else over_ranks(own)
            launched = partial(self._launch, reached, own)
            merge = launched if self._recorded is None else partial(self._replay, self._recorded)
            info, merged, norm = merge(watched, names, factor)
            nbytes = parts.sink.nbytes()
            if info.skipped is not None:
                parts.sink.clear()  # kept pairs would live through the next forward
            if merged is not None:
                info, clip = clip_gradients(info, norm, parts.max_norm, merged, parts.target.factor)
                if own:
                    merged.update(zip(map(id, parts.own), torch._foreach_mul(own, factor * clip), strict=True))
        watch.stop()
        if merged is not None:
            with profile_range("communication"):
                parts.target.hand_over(merged, reached)
        return dataclasses.replace(info, nbytes=nbytes, stopwatch=watch)

    def _launch(
        self, reached: set[int], own: list[Tensor], watched: list[Tensor], names: list[str], factor: float
    ) -> _Merged:
        parts = self._parts
        gram = parts.sink.gramian() / self._scale**2
        info, weights = parts.solver.solve(gram, self._step, parts.target, watched, names, self._own_scale())
        if info.skipped is not None:
            return info, None, None
        norm = None if parts.sink.sketches else shared_norm(info)
        optimizer = parts.target.merging_optimizer(norm) if parts.sink.stacks else None
        if optimizer is None:
            clip = known_clip(info, norm, parts.max_norm)
            scaled = weights * (factor if clip is None else factor * clip)
            return info, parts.sink.combine(scaled, narrow=not parts.target.scales()), norm
        found = dict(zip(map(id, parts.own), own, strict=True))  # this one has no scale and no number of ranks
        dense, tables = parts.sink.unmerged(weights)
        parts_of = _only(dense, reached), _only(tables, reached), _only(found, reached)
        optimizer.take(TaskUpdate(weights, *parts_of, norm or 0.0))
        return info, None, None

    def _replay(self, recorded: RecordedStep, watched: list[Tensor], names: list[str], factor: float) -> _Merged:
        solver, target = self._parts.solver, self._parts.target
        recorded.run(solver.order(), self._scale, factor)
        gram, weights = recorded.gram, recorded.weights
        info, spoilt = solver.judge(gram, weights, self._step, target, watched, names, self._own_scale())
        if info.skipped is not None:
            return info, None, None
        norm = shared_norm(info)
        clip = float("nan") if spoilt else known_clip(info, norm, self._parts.max_norm)
        if clip is not None and clip != 1.0:
            recorded.scale(clip)
        return info, recorded.gradients(), norm

    def _own_scale(self) -> float | None:
        return None if self._parts.max_norm is None else self._scale


def _only(by_id: Mapping[int, _Value], reached: Collection[int]) -> dict[int, _Value]:
    return {key: value for key, value in by_id.items() if key in reached}
