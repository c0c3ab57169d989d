"""The steps of a GradientSurgery: which kind each one is, and where it gets its objects from."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl.errors import UserError
from fastmtl.surgery import checks
from fastmtl.surgery.attach.reading import is_table, read_rows
from fastmtl.surgery.checks import Scope
from fastmtl.surgery.info import SurgeryInfo
from fastmtl.surgery.losses import Losses
from fastmtl.surgery.parts import Parts
from fastmtl.surgery.sinks.gramian import GramianSink
from fastmtl.surgery.sinks.layer_gramians import LayerGramians, LayerWatcher
from fastmtl.surgery.sinks.sink import Sink
from fastmtl.surgery.sinks.source import GramianSource, MergingSink
from fastmtl.surgery.sinks.tensor import TensorSink
from fastmtl.surgery.step_losses import LossFunction, Step
from fastmtl.surgery.steps.features import FeaturesStep
from fastmtl.surgery.steps.joint import ClippedJointStep, JointStep
from fastmtl.surgery.steps.replay import replay
from fastmtl.surgery.steps.stacked import RecordedMerging, RecordMerging, StackedStep
from fastmtl.surgery.steps.tensor_scope import tensor_scope
from fastmtl.surgery.targets.ddp import without_reduction

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Choices of a GradientSurgery that decide the kind of its steps.

    task_weights: fixed factors of the tasks' losses. by_rank: True for reduce "local". joint: True
    if no task gradients are taken. plain: True if that was asked for (the method "sum"), False if
    nothing shared is trained. per_task: True for passes "per_task".
    """

    model: nn.Module | None
    task_weights: list[float]
    storage: str
    scope: Scope
    by_rank: bool
    joint: bool
    plain: bool
    per_task: bool


class StepRunner:
    """Runner of steps: those of `run` as a whole, those of `backward` one micro-batch at a time.

    The methods with the names of GradientSurgery's are described there.
    """

    def __init__(self, parts: Parts, sink: Sink, settings: Settings) -> None:
        self.parts, self._sink, self._settings = parts, sink, settings
        self._open: JointStep | StackedStep | FeaturesStep | None = None
        self._warned = False
        self._watcher: LayerWatcher | None = None
        self._recorded: RecordedMerging | None = None
        self.not_recorded: Sequence[str] = ()

    def run(
        self,
        micro_batches: Sequence[Any],
        loss_fn: Callable[..., Losses | tuple[Losses, Any]],
        counts: Mapping[str, int] | None,
        weights: Mapping[str, float] | None,
        *,
        features: bool,
        stop: bool,
    ) -> SurgeryInfo:
        if not micro_batches:
            raise UserError("micro_batches: a step needs at least one")
        checks.check_counts_given(counts, several=len(micro_batches) > 1)
        parts, sink = self.parts, self._sink
        losses_of = LossFunction(loss_fn, parts.target, None if features else parts.attached)
        step = self._new_step(counts, weights, stop, features=features)
        try:
            if features:
                return self._features_step(step).run(micro_batches, losses_of)
            if isinstance(sink, TensorSink):
                return tensor_scope(parts, sink, step, micro_batches, losses_of, by_rank=self._settings.by_rank)
            if isinstance(sink, GramianSink):
                return replay(parts, sink, step, micro_batches, losses_of)
            self._check_takes_sink(losses_of.takes_sink)
            return self._start(step).run(micro_batches, losses_of)
        finally:
            self._sink.disarm()
            self._forget_rows()

    @contextmanager
    def rows(self, tasks: Any) -> Iterator[None]:
        model, attached, storage = self._settings.model, self.parts.attached, self._settings.storage
        if model is None:
            raise UserError("rows: surgery has no model: give the trunk in GradientSurgery(..., model=...)")
        numbers, table = read_rows(tasks, self.parts.tasks), is_table(tasks)
        with without_reduction(model):
            if attached is None:
                yield
                return
            if any(len(row) > 1 for row in numbers):
                checks.check_several_tasks(storage, self._settings.scope, table=table)
            starts = torch.is_grad_enabled() and not attached.active
            if starts:
                verifier = self.parts.verifier
                due = self._open is None and verifier is not None and verifier.due
                attached.begin(self.arm(), verifying=due)
            try:
                with attached.rows(numbers, equal_sets=storage == "replay" and table):
                    yield
            except BaseException:
                if starts:
                    attached.forget()
                    self._sink.disarm()
                raise

    def backward(
        self,
        losses: Losses,
        counts: Mapping[str, int] | None,
        weights: Mapping[str, float] | None,
        *,
        features: Any,
        last: bool,
        stop: bool,
    ) -> SurgeryInfo | None:
        if features is not None:
            return self._backward_of_features(losses, features, counts, weights, last=last, stop=stop)
        checks.check_backward(self._settings.storage, self._settings.scope, joint=self._settings.joint)
        takes_sink = self._sink.active
        if self.parts.attached is not None and not takes_sink:
            raise UserError("backward: no forward of `model` ran in a block `with surgery.rows(...)` for these losses")
        try:
            if self._open is None:
                checks.check_counts_given(counts, several=not last)
                self._open = self._start(self._new_step(counts, weights, stop))
            step = self._open
            if isinstance(step, FeaturesStep):
                raise UserError(checks.FEATURES_OF_ALL)
            if last:
                self._open = None
            if not takes_sink and not self._settings.joint:
                self._sink.arm(self.parts.target.device)
            self._check_takes_sink(takes_sink)
            step.backward(losses, takes_sink=takes_sink, last=last)
        except BaseException:
            self._open = None
            raise
        finally:
            self._sink.disarm()
            self._forget_rows()
        return step.finish() if last else None

    def _backward_of_features(
        self,
        losses: Losses,
        features: Any,
        counts: Mapping[str, int] | None,
        weights: Mapping[str, float] | None,
        *,
        last: bool,
        stop: bool,
    ) -> SurgeryInfo | None:
        step, self._open = self._open, None
        if self._sink.active:
            self._sink.disarm()
            self._forget_rows()
            raise UserError(checks.FEATURES_OUTSIDE)
        if step is None:
            checks.check_counts_given(counts, several=not last)
            step = self._features_step(self._new_step(counts, weights, stop, features=True))
        if not isinstance(step, FeaturesStep):
            raise UserError(checks.FEATURES_OF_ALL)
        step.backward(losses, features, last=last)
        if last:
            return step.finish()
        self._open = step
        return None

    def arm(self) -> Sink:
        """Return the sink, armed until the next `backward`, for the forward that follows."""
        checks.check_backward(self._settings.storage, self._settings.scope, joint=self._settings.joint)
        if not self._settings.joint:
            self._sink.arm(self.parts.target.device)
        return self._sink

    def detach(self) -> None:
        if self.parts.attached is not None:
            self.parts.attached.detach()
        self.parts = dataclasses.replace(self.parts, attached=None)

    def record_with(self, record: RecordMerging) -> None:
        method = self.parts.solver.method
        if self.parts.verifier is not None and self._settings.model is None:
            raise UserError("cuda_graphs: verify_every compares only steps that are not recorded: give one of them")
        if self._watcher is not None:
            raise UserError("cuda_graphs: diagnose measures only steps that are not recorded: call its stop() before")
        if self.parts.solver.balance is not None:
            self.not_recorded = ["balance needs the columns of J before the weights are known"]
            log.warning("gradient surgery falls back to eager execution: %s", self.not_recorded[0])
        elif method is not None:  # a sum has nothing to record
            target = self.parts.target
            self._recorded, self.not_recorded = record(self._sink, method, target, self._settings.storage)

    def recorded_tensors(self) -> list[Tensor]:
        """Return the buffers of `cuda_graphs`."""
        return [] if self._recorded is None else self._recorded.tensors()

    def watch(self, watcher: LayerWatcher | None) -> None:
        if watcher is not None:
            checks.check_watched(
                joint=self._settings.joint,
                scope=self._settings.scope,
                sketches=isinstance(self._sink, GramianSource) and self._sink.sketches,
                recorded=self._recorded is not None,
                watched=self._watcher is not None,
            )
        self._watcher = watcher

    def _new_step(
        self,
        counts: Mapping[str, int] | None,
        weights: Mapping[str, float] | None,
        stop: bool,
        *,
        features: bool = False,
    ) -> Step:
        parts = self.parts
        if features:
            checks.check_features_watched(watched=self._watcher is not None)
            checks.check_features_balanced(balanced=parts.solver.balance is not None)
        if not self._settings.plain:  # in a plain sum, autograd decides which parameters get a gradient
            parts.target.check_trained()
        parts.target.begin()
        of_step = checks.check_task_weights(weights or {}, parts.tasks, "weights")
        parts.solver.next_step()
        if parts.solver.balance is not None:
            parts.solver.balance.begin(parts.target.loss_scale())
        if isinstance(self._sink, GramianSource):
            self._sink.layers = self._layers_to_measure()
        return Step(
            counts,
            tasks=parts.tasks,
            task_weights=[fixed * factor for fixed, factor in zip(self._settings.task_weights, of_step, strict=True)],
            device=parts.target.device,
            # Every loss depends on shared parameters; if none is trained, a loss may be constant.
            constants=not parts.shared,
            stop=stop,
            check_rows=None if parts.attached is None or features else parts.attached.check_losses,
            verifies=not features and parts.verifier is not None and parts.verifier.next_step(),
        )

    def _start(self, step: Step) -> JointStep | StackedStep:
        if not self._settings.joint:
            assert isinstance(self._sink, MergingSink)
            return StackedStep(self.parts, self._sink, step, self._recorded)
        kind = JointStep if self.parts.max_norm is None else ClippedJointStep
        return kind(self.parts, self._sink, step)

    def _features_step(self, step: Step) -> FeaturesStep:
        settings = self._settings
        return FeaturesStep(self.parts, self._sink, step, by_rank=settings.by_rank, merges=not settings.joint)

    def _layers_to_measure(self) -> LayerGramians | None:
        watcher, target, by_rank = self._watcher, self.parts.target, self._settings.by_rank
        if watcher is None or not watcher.next_step():
            return None
        scale = target.loss_scale()
        found = LayerGramians(watcher.layer_of, len(self.parts.tasks), target.device, scale=scale, by_rank=by_rank)
        watcher.take(self.parts.solver.step, found)
        return found

    def _forget_rows(self) -> None:
        if self.parts.attached is not None:
            self.parts.attached.forget()

    def _check_takes_sink(self, takes_sink: bool) -> None:
        """Raise UserError, or warn once, for a model whose layers do not write into the sink."""
        if takes_sink or self._settings.joint:
            return
        checks.check_per_task(self._settings.storage)
        if not self._warned and not self._settings.per_task:
            self._warned = True
            log.warning("no `model` was given: running one backward pass per task (see docs/surgery.md)")
