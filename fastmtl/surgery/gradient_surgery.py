"""Gradient surgery for a training loop: `run` takes the micro-batches of one step and leaves one merged gradient.

T tasks. Loss of task t = weight_t * (sum of its losses over the whole step) / (its rows in the whole step), over
micro-batches and ranks together, so the same rows give the same step however they are spread. J holds the
T gradients of the shared parameters.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from fastmtl.errors import UserError
from fastmtl.surgery.checks import (
    SKETCH_SIZE,
    Reduce,
    Scope,
    Storage,
    check_options,
    check_parameters,
    check_sketch,
    check_task_weights,
    check_tasks,
    find_shared,
)
from fastmtl.surgery.clipping import check_max_norm
from fastmtl.surgery.joint import JointStep, WatchedJointStep
from fastmtl.surgery.losses import Losses
from fastmtl.surgery.methods.method import Reduction
from fastmtl.surgery.methods.table import find_method
from fastmtl.surgery.parts import Parts
from fastmtl.surgery.ranks.alone import Alone
from fastmtl.surgery.ranks.together import Together
from fastmtl.surgery.replay import replay
from fastmtl.surgery.sinks.gramian import GramianSink
from fastmtl.surgery.sinks.keep import KeepSink
from fastmtl.surgery.sinks.sink import Sink
from fastmtl.surgery.sinks.source import MergingSink
from fastmtl.surgery.sinks.stack import StackSink
from fastmtl.surgery.sinks.tensor import TensorSink
from fastmtl.surgery.solver import Solver
from fastmtl.surgery.stacked import RecordedMerging, RecordMerging, StackedStep
from fastmtl.surgery.step import LossFunction, Step, SurgeryInfo
from fastmtl.surgery.targets.find import find_target
from fastmtl.surgery.tensor_scope import tensor_scope

log = logging.getLogger(__name__)

_COUNTS = "counts: with several micro-batches give {task: rows in the whole step, over all ranks}"


class GradientSurgery:
    """`sum` or a gradient method on a DeepSpeed engine or a torch optimiser.

    target: the engine (ZeRO 0 to 3) or, in one process, the optimiser. method: "sum", "pcgrad", "gradvac", or a
    Gramian weighting of TorchJD in lower case ("upgrad", "mgda", ...); options: what it takes ({"c": 0.4} for
    "cagrad").
    tasks: their names, in the order of segments and rows of J.
    shared: the parameters that surgery is about, each once; the others get their own gradient. Default: all of the
    target. Which of them are trained is settled here: after a later change make another object.
    sparse: shared embedding tables whose gradient is kept as compact rows.
    storage: "stacked" keeps J; "kept" keeps the inputs and output gradients of the layers and multiplies them a second
    time; "replay" keeps only G and runs forward and backward a second time; "auto" takes stacked where the target can
    (ZeRO 0 to 2 without offload).
    scope: "global", or "tensor": surgery on each parameter tensor by itself as soon as backward has its T gradients.
    That is another method (finer, and for each micro-batch by itself); it needs no J and no second pass in any stage.
    reduce: "exact": J is that of all ranks. "local": every rank projects its own J, then the ranks average. "sketch":
    J's inner products come from count-sketches of `sketch_size` buckets a task, all that crosses the network besides
    the merged gradient; a cosine is off by at most sqrt(2 / sketch_size) in the root mean square.
    dtype: of J in `stacked`; bfloat16 halves it and rounds every task gradient to 8 bits.
    task_weights: fixed weight of each task's loss, applied before the Gramian. reduction: of the modified gradients,
    "sum" (the paper) or "mean"; for pcgrad and gradvac.
    seed: of the random order in which tasks meet, with the step's number.
    cuda_graphs: whether Gramian, weights and merging are one CUDA graph, where they can be; the log says where not.
    max_norm: clips the gradient of all trained parameters together, by the norm that G gives, so that the engine's own
    `gradient_clipping` can be 0 and its checks of the gradient off; math.inf only finds the norm. None leaves all that
    to the target. With `sum` it needs one process.
    Raises UserError for an unknown name, and for a combination that cannot do what it promises. `sum` heeds none of
    storage, scope, reduce and dtype.
    """

    def __init__(
        self,
        target: Any,
        method: str = "pcgrad",
        *,
        tasks: Sequence[str],
        shared: Sequence[nn.Parameter] | None = None,
        sparse: Sequence[nn.Parameter] = (),
        storage: Storage = "auto",
        scope: Scope = "global",
        reduce: Reduce = "exact",
        dtype: torch.dtype = torch.float32,
        sketch_size: int = SKETCH_SIZE,
        task_weights: Mapping[str, float] | None = None,
        reduction: Reduction = "sum",
        options: Mapping[str, Any] | None = None,
        seed: int = 0,
        cuda_graphs: RecordMerging | Literal[False] = False,
        max_norm: float | None = None,
    ) -> None:
        self._target = find_target(target)
        chosen = find_method(method, reduction, options)
        self.tasks = check_tasks(tasks)
        self._weights = check_task_weights(task_weights or {}, self.tasks)
        sparse = check_parameters("sparse", sparse)
        inside = find_shared(self._target, shared, sparse)
        inside_ids = {id(p) for p in inside}
        if not inside and chosen is not None:
            log.warning("no shared parameter is trained, so there is nothing that tasks could disagree on: sum")
            chosen = None
        self.storage = check_options(
            self._target.stacks,
            chosen,
            storage=storage,
            scope=scope,
            reduce=reduce,
            dtype=dtype,
            sketch_size=sketch_size,
        )
        check_max_norm(max_norm, self._target, self.storage, reduce, joint=chosen is None)
        if reduce == "sketch":
            check_sketch(sketch_size, sparse)
        self._joint, self._scope, self._by_rank = chosen is None, scope, reduce == "local"
        self._plain = method == "sum"
        self._solver = Solver(chosen, method, self.tasks, seed, by_rank=self._by_rank)
        self._sink = self._make_sink(inside, sparse, dtype, reduce, sketch_size if reduce == "sketch" else None)
        own = [p for p in self._target.parameters if id(p) not in inside_ids]
        self._parts = Parts(self._target, self._solver, self.tasks, inside, own, max_norm)
        self._open: JointStep | StackedStep | None = None
        self._warned = False
        self._recorded: RecordedMerging | None = None
        self._not_recorded: Sequence[str] = ()
        if cuda_graphs is True:
            raise UserError(
                "cuda_graphs=True: surgery itself records nothing: pass cuda_graphs=fastmtl.cuda_graphs.record_merging"
            )
        if cuda_graphs:
            self.record_with(cuda_graphs)

    def record_with(self, record: RecordMerging) -> None:
        """Merge by recordings that `record` makes, as the argument `cuda_graphs` does."""
        method = self._solver.method
        if method is not None:  # a sum has none of this
            self._recorded, self._not_recorded = record(self._sink, method, self._target, self.storage)

    def run(
        self,
        micro_batches: Sequence[Any],
        loss_fn: Callable[..., Losses],
        counts: Mapping[str, int] | None = None,
        weights: Mapping[str, float] | None = None,
        *,
        stop: bool = False,
    ) -> SurgeryInfo:
        """Forward and backward of one optimiser step; then call `engine.step()` (or `optimizer.step()`) unless
        `skipped`.

        loss_fn(micro_batch, ...) -> {task: (sum of the rows' losses, number of rows)}. It is given by keyword what it
        declares: `model`, what to call (the engine or its module, by pass; needed for replay under DeepSpeed), and
        `task_grads`, the sink, for a model whose layers write into it. Without `task_grads` there is one backward per
        task.
        counts: rows of each task in the whole step over all ranks; needed with several micro-batches, else counted.
        weights: of the tasks' losses in this step, times the fixed ones; the same on every rank.
        stop: whether this rank wants to end after this step, as after a signal; `info.stop` says whether any does. It
        travels with the losses.
        Raises UserError where the losses are no scalar sums of rows or do not fit `tasks` or `counts`, where a shared
        parameter's gradient goes past the sink or is sparse, for re-entrant checkpointing, and where a parameter was
        frozen or unfrozen; TrainingError after five skipped steps in a row, and for a loss (`sum`) or gradient
        (`scope="tensor"`) that is not finite where the step cannot be skipped any more.
        """
        if not micro_batches:
            raise UserError("micro_batches: a step needs at least one")
        if counts is None and len(micro_batches) > 1:
            raise UserError(_COUNTS)
        losses_of = LossFunction(loss_fn, self._target)
        step = self._new_step(counts, weights, stop)
        if isinstance(self._sink, TensorSink):
            return tensor_scope(self._parts, self._sink, step, micro_batches, losses_of, by_rank=self._by_rank)
        if isinstance(self._sink, GramianSink):
            return replay(self._parts, self._sink, step, micro_batches, losses_of)
        self._check_takes_sink(losses_of.takes_sink)
        return self._start(step).run(micro_batches, losses_of)

    @property
    def task_grads(self) -> Sink:
        """The sink for a forward whose losses go to `backward`: it takes writes until then. For models of fastmtl's
        layers. Raises UserError as `backward` does.
        """
        self._check_backward()
        if not self._joint:
            self._sink.arm(self._target.device)
        return self._sink

    def backward(
        self,
        losses: Losses,
        counts: Mapping[str, int] | None = None,
        weights: Mapping[str, float] | None = None,
        *,
        last: bool = True,
        stop: bool = False,
    ) -> SurgeryInfo | None:
        """In place of `engine.backward(loss)`, where the losses are at hand: {task: (sum of the rows' losses, rows)}.

        counts: rows of each task in the whole step over all ranks; needed with several micro-batches a step, else
        counted. weights, stop: as of `run`, taken from the first call of a step. Drop the losses afterwards: with
        `cuda_graphs` the next forward cannot be captured while they are there. last: whether this is the last
        micro-batch of the step; the merged gradient and the SurgeryInfo come with it, None before.
        Raises UserError as `run` does, and where a step cannot be done without running forward again: use `run` there.
        """
        self._check_backward()
        takes_sink = self._sink.active
        try:
            if self._open is None:
                if counts is None and not last:
                    raise UserError(_COUNTS)
                self._open = self._start(self._new_step(counts, weights, stop))
            way = self._open
            if last:
                self._open = None
            if not takes_sink and not self._joint:
                self._sink.arm(self._target.device)
            self._check_takes_sink(takes_sink)
            way.backward(losses, takes_sink=takes_sink, last=last)
        except BaseException:
            self._open = None
            raise
        finally:
            self._sink.disarm()
        return way.finish() if last else None

    @property
    def not_recorded(self) -> list[str]:
        """Reasons why `cuda_graphs` recorded nothing so far, as the log has them. Empty without `cuda_graphs`."""
        return list(self._not_recorded)

    def kept_tensors(self) -> list[torch.Tensor]:
        """What is kept of task gradients now: J, its shards, sketch and compact rows, and what `cuda_graphs` needs."""
        return self._sink.tensors() + ([] if self._recorded is None else self._recorded.tensors())

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready: what the next step's order, the skipped steps and the method depend on."""
        return self._solver.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._solver.load_state_dict(state)

    def _new_step(self, counts: Mapping[str, int] | None, weights: Mapping[str, float] | None, stop: bool) -> Step:
        if not self._plain:  # a plain sum leaves it to autograd which parameters get a gradient
            self._target.check_trained()
        of_step = check_task_weights(weights or {}, self.tasks, "weights")
        self._solver.next_step()
        both = [fixed * now for fixed, now in zip(self._weights, of_step, strict=True)]
        # What every task shares reaches every loss; where nothing shared is trained, a task may have nothing to train.
        settings: dict[str, Any] = {"constants": not self._parts.shared, "stop": stop}
        return Step(counts, tasks=self.tasks, task_weights=both, device=self._target.device, **settings)

    def _make_sink(
        self,
        shared: Sequence[nn.Parameter],
        sparse: Sequence[nn.Parameter],
        dtype: torch.dtype,
        reduce: Reduce,
        sketch_size: int | None,
    ) -> Sink:
        """Return the sink of the storage; that of `sum` is never armed."""
        ranks = Alone() if reduce == "local" else Together()
        parts = shared, len(self.tasks)
        if not self._joint and self._scope == "tensor":
            return TensorSink(*parts, sparse=sparse, ranks=ranks)
        if self.storage == "replay":
            return GramianSink(*parts, sparse=sparse, ranks=ranks, sketch_size=sketch_size)
        if self.storage == "kept":
            return KeepSink(*parts, sparse=sparse, ranks=ranks, sketch_size=sketch_size)
        return StackSink(*parts, sparse=sparse, dtype=dtype, ranks=ranks, sketch_size=sketch_size)

    def _start(self, step: Step) -> JointStep | StackedStep:
        if not self._joint:
            assert isinstance(self._sink, MergingSink)
            return StackedStep(self._parts, self._sink, step, self._recorded)
        kind = JointStep if self._parts.max_norm is None else WatchedJointStep
        return kind(self._parts, self._sink, step)

    def _check_backward(self) -> None:
        if not self._joint and self.storage not in ("stacked", "kept"):
            reason = "scope='tensor'" if self._scope == "tensor" else "storage='replay' (ZeRO 3, offload)"
            raise UserError(f"backward: {reason} makes the forward itself; use run(micro_batches, loss_fn)")

    def _check_takes_sink(self, takes_sink: bool) -> None:
        """Raise UserError where the storage needs layers that know the sink; warn once where they would be faster."""
        if takes_sink or self._joint:
            return
        if self.storage == "kept":
            raise UserError(
                "storage='kept' needs a model whose layers write into task_grads, since it keeps what their weights' "
                "gradients are products of: use storage='stacked'"
            )
        if not self._warned:
            self._warned = True
            log.warning("the model takes no task_grads: one backward pass per task (see docs/surgery.md)")
