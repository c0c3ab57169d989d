"""Gradient surgery for a training loop: `run` takes the micro-batches of one step and leaves one merged gradient.

T tasks. Loss of task t = weight_t * (sum of its losses over the whole step) / (its rows in the whole step), over
micro-batches and ranks together, so the same rows give the same step however they are spread. J holds the
T gradients of the shared parameters.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl.errors import TrainingError
from fastmtl.surgery.methods import Reduction, draw_order, find_method
from fastmtl.surgery.random_state import RandomState
from fastmtl.surgery.reduce import gather_rows, scatter_columns, sum_over_ranks, world_size
from fastmtl.surgery.targets import find_target
from fastmtl.surgery.task_gradients import TaskGradients

log = logging.getLogger(__name__)

Losses = Mapping[str, tuple[Tensor, int]]
MAX_SKIPPED = 5


@dataclass(frozen=True)
class SurgeryInfo:
    """By-products of a step, over all ranks.

    losses: mean loss of each task that had rows. cosines [T, T] between task gradients (NaN for an absent task),
    conflict_rate: share of
    task pairs with a negative cosine, task_norms [T], weights [T] of the gradients in the update, merged_norm: of the
    shared
    update; all None for `sum`. skipped: the task with a non-finite gradient; do not call step() then.
    """

    losses: dict[str, float]
    cosines: Tensor | None = None
    conflict_rate: float | None = None
    task_norms: Tensor | None = None
    weights: Tensor | None = None
    merged_norm: float | None = None
    skipped: str | None = None


class GradientSurgery:
    """`sum` or a gradient method on a DeepSpeed engine or a torch optimiser.

    target: the engine (ZeRO 0 to 3) or, in one process, the optimiser. method: "sum" or "pcgrad".
    tasks: their names, in the order of segments and rows of J.
    shared: the parameters that surgery is about; the others get their own gradient. Default: all of the target.
    sparse: shared embedding tables whose gradient is kept as compact rows.
    storage: "stacked" keeps J; "replay" keeps only G and runs forward and backward a second time; "auto" takes stacked
    where the
    target can (ZeRO 0 to 2 without offload).
    task_weights: fixed weight of each task's loss, applied before the Gramian. reduction: of PCGrad, "sum" (the paper)
    or "mean".
    seed: of PCGrad's random order, with the step's number.
    Raises ValueError for an unknown name, and for a combination that cannot do what it promises.
    """

    def __init__(
        self,
        target: Any,
        method: str = "pcgrad",
        *,
        tasks: Sequence[str],
        shared: Sequence[nn.Parameter] | None = None,
        sparse: Sequence[nn.Parameter] = (),
        storage: str = "auto",
        task_weights: Mapping[str, float] | None = None,
        reduction: Reduction = "sum",
        seed: int = 0,
    ) -> None:
        self._target = find_target(target)
        self._method = find_method(method)
        self.tasks = list(tasks)
        trainable = {id(p) for p in self._target.parameters}
        self._shared = [p for p in (self._target.parameters if shared is None else shared) if id(p) in trainable]
        shared_ids = {id(p) for p in self._shared}
        self._own = [p for p in self._target.parameters if id(p) not in shared_ids]
        if storage not in ("auto", "stacked", "replay"):
            raise ValueError(f"storage must be auto, stacked or replay, got {storage!r}")
        if storage == "stacked" and not self._target.stacks:
            raise ValueError(
                "storage='stacked' needs every gradient at hand, which ZeRO 3 and offload do not give: "
                "use storage='replay'"
            )
        self.storage = storage if storage != "auto" else ("stacked" if self._target.stacks else "replay")
        self._weights = [float((task_weights or {}).get(name, 1.0)) for name in self.tasks]
        self._reduction, self._seed = reduction, seed
        self._sink = TaskGradients(
            self._shared, len(self.tasks), sparse=sparse, scatter=scatter_columns, gather_rows=gather_rows
        )
        self._step = self._skipped = self._skipped_in_a_row = 0
        self._told = False

    def run(
        self, micro_batches: Sequence[Any], loss_fn: Callable[..., Losses], counts: Mapping[str, int] | None = None
    ) -> SurgeryInfo:
        """Forward and backward of one optimiser step; then call `engine.step()` (or `optimizer.step()`) unless
        `skipped`.

        loss_fn(micro_batch, ...) -> {task: (sum of the rows' losses, number of rows)}. It is given by keyword what it
        declares:
        `model`, what to call (the engine or its module, by pass; needed for replay under DeepSpeed), and `task_grads`,
        the sink, for a
        model whose layers write into it. Without `task_grads` there is one backward per task.
        counts: rows of each task in the whole step over all ranks; needed with several micro-batches, else counted.
        """
        if counts is None and len(micro_batches) > 1:
            raise ValueError("counts: with several micro-batches give {task: rows in the whole step, over all ranks}")
        self._step += 1
        step = _Step(self, micro_batches, loss_fn, counts)
        if self._method is None or not self._shared:
            return self._sum(step)
        if not step.takes_sink and not self._told:
            self._told = True
            log.warning("loss_fn takes no task_grads: one backward pass per task (see docs/surgery.md)")
        return self._replay(step) if self.storage == "replay" else self._stacked(step)

    def state_dict(self) -> dict[str, int]:
        """JSON-ready."""
        return {"step": self._step, "skipped": self._skipped, "skipped_in_a_row": self._skipped_in_a_row}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self._step, self._skipped = state["step"], state["skipped"]
        self._skipped_in_a_row = state["skipped_in_a_row"]

    def _sum(self, step: _Step) -> SurgeryInfo:
        for index in range(len(step.micro_batches)):
            losses = step.losses(index, training_pass=True)
            self._target.backward(step.total(losses), last=index == len(step.micro_batches) - 1)
        return SurgeryInfo(losses=step.mean_losses())

    def _stacked(self, step: _Step) -> SurgeryInfo:
        scale = self._target.loss_scale()
        self._sink.clear()
        own = [torch.zeros_like(p, dtype=torch.float32) for p in self._own]
        for index in range(len(step.micro_batches)):
            with self._sink.armed("stack", self._target.device):
                losses = step.losses(index, training_pass=False)
                if step.takes_sink:
                    gradients = torch.autograd.grad(
                        step.total(losses) * scale, [self._sink.anchor, *self._own], allow_unused=True
                    )[1:]
                    _add(own, gradients)
                else:
                    self._one_by_one(step, losses, scale, own)
        info, weights = self._solve(step, scale)
        if info.skipped is None or self._target.loss_scale() != 1.0:  # fp16: DeepSpeed sees the overflow and backs off
            merged = self._sink.combine(weights / scale)
            merged.update({id(p): gradient / scale for p, gradient in zip(self._own, own, strict=True)})
            self._target.hand_over(merged)
        return info

    def _one_by_one(self, step: _Step, losses: Losses, scale: float, own: list[Tensor]) -> None:
        """The textbook way, for a model that is not made of fastmtl's layers: one backward per task."""
        for t, name in enumerate(self.tasks):
            if name not in losses or losses[name][1] == 0:
                continue
            gradients = torch.autograd.grad(
                step.scaled(name, losses) * scale, [*self._shared, *self._own], retain_graph=True, allow_unused=True
            )
            for parameter, gradient in zip(self._shared, gradients, strict=False):
                if gradient is None:
                    continue
                if self._sink.is_sparse(parameter):
                    ids = gradient.abs().sum(1).nonzero().squeeze(1)
                    self._sink.add_rows(parameter, t, ids, gradient[ids])
                else:
                    self._sink.views(parameter)[t].add_(gradient)
            _add(own, gradients[len(self._shared) :])

    def _replay(self, step: _Step) -> SurgeryInfo:
        if not step.takes_sink:
            raise ValueError(
                "storage='replay' (ZeRO 3, offload) needs a model whose layers write into task_grads: DeepSpeed holds "
                "the weights of other models only inside their forward. Use ZeRO 0 to 2 without offload."
            )
        scale = self._target.loss_scale()
        self._sink.clear()
        states = []
        for index in range(len(step.micro_batches)):
            states.append(RandomState.capture(self._target.device))
            with self._sink.armed("gramian", self._target.device, keep=len(step.micro_batches) > 1):
                losses = step.losses(index, training_pass=False)
                torch.autograd.grad(step.total(losses) * scale, [self._sink.anchor])
        after = RandomState.capture(self._target.device)
        info, weights = self._solve(step, scale)
        self._sink.clear()
        if info.skipped is not None and scale == 1.0:
            return info
        for index, state in enumerate(states):
            state.restore()  # the same dropout masks as in the first pass
            with self._sink.armed("weighted", self._target.device, weights=weights):
                losses = step.losses(index, training_pass=True, count=False)
                self._target.backward(step.total(losses), last=index == len(states) - 1)
        after.restore()
        return info

    def _solve(self, step: _Step, scale: float) -> tuple[SurgeryInfo, Tensor]:
        """G over all ranks, the weights, and what they tell."""
        assert self._method is not None
        gram = (sum_over_ranks(self._sink.gramian()) + self._sink.sparse_gramian()) / scale**2
        order = draw_order(len(self.tasks), self._seed, self._step).to(gram.device)
        weights = self._method(gram, order, self._reduction)
        host = gram.cpu()
        losses = step.mean_losses()
        bad = [name for t, name in enumerate(self.tasks) if not torch.isfinite(host[t, t])]
        if bad:
            return self._skip(bad[0], losses, scale), weights
        self._skipped_in_a_row = 0
        norms = host.diagonal().clamp(min=0).sqrt()
        cosines = host / (norms[:, None] * norms[None, :])
        cosines[norms == 0, :] = cosines[:, norms == 0] = float("nan")
        upper = cosines[torch.triu(torch.ones_like(cosines, dtype=torch.bool), diagonal=1)]
        upper = upper[~upper.isnan()]
        on_host = weights.cpu()
        info = SurgeryInfo(
            losses=losses,
            cosines=cosines,
            conflict_rate=float((upper < 0).float().mean()) if len(upper) else 0.0,
            task_norms=norms,
            weights=on_host,
            merged_norm=float((on_host @ host @ on_host).clamp(min=0).sqrt()),
        )
        return info, weights

    def _skip(self, task: str, losses: dict[str, float], scale: float) -> SurgeryInfo:
        if scale <= 1.0:  # above it, fp16 overflows belong to the loss scaler
            self._skipped += 1
            self._skipped_in_a_row += 1
            log.warning("step %d skipped: the gradient of task %s is not finite", self._step, task)
            if self._skipped_in_a_row == MAX_SKIPPED:
                raise TrainingError(
                    f"the gradient of task {task} was not finite in {MAX_SKIPPED} steps in a row: lower optimizer.lr, "
                    "lengthen schedule.warmup, or look for broken rows of that task"
                )
        return SurgeryInfo(losses=losses, skipped=task)


class _Step:
    """One optimiser step's losses: calls loss_fn and keeps the sums for the means."""

    def __init__(
        self,
        surgery: GradientSurgery,
        micro_batches: Sequence[Any],
        loss_fn: Callable[..., Losses],
        counts: Mapping[str, int] | None,
    ) -> None:
        self.micro_batches = micro_batches
        self._surgery, self._loss_fn, self._counts = surgery, loss_fn, counts
        declared = inspect.signature(loss_fn).parameters
        self.takes_sink = "task_grads" in declared
        self._takes_model = "model" in declared
        self._sums = torch.zeros(len(surgery.tasks), dtype=torch.float64, device=surgery._target.device)

    def losses(self, index: int, *, training_pass: bool, count: bool = True) -> Losses:
        surgery = self._surgery
        keywords: dict[str, Any] = {"task_grads": surgery._sink} if self.takes_sink else {}
        if self._takes_model:
            keywords["model"] = surgery._target.model(training_pass)
        losses = self._loss_fn(self.micro_batches[index], **keywords)
        unknown = set(losses) - set(surgery.tasks)
        if unknown:
            raise ValueError(
                f"loss_fn gave losses of {', '.join(sorted(unknown))}, tasks are {', '.join(surgery.tasks)}"
            )
        if self._counts is None:
            local = [losses[name][1] if name in losses else 0 for name in surgery.tasks]
            total = sum_over_ranks(torch.tensor(local, device=surgery._target.device))
            self._counts = dict(zip(surgery.tasks, total.tolist(), strict=True))
        if count:
            for t, name in enumerate(surgery.tasks):
                if name in losses:
                    self._sums[t] += losses[name][0].detach()
        return losses

    def scaled(self, name: str, losses: Losses) -> Tensor:
        """This micro-batch's part of the task's weighted mean loss."""
        assert self._counts is not None
        weight = self._surgery._weights[self._surgery.tasks.index(name)]
        return losses[name][0] * (weight / max(self._counts.get(name, 0), 1))

    def total(self, losses: Losses) -> Tensor:
        return torch.stack([self.scaled(name, losses) for name in losses]).sum()

    def mean_losses(self) -> dict[str, float]:
        """Unweighted mean loss of each task over all ranks."""
        assert self._counts is not None
        sums = sum_over_ranks(self._sums.clone()) if world_size() > 1 else self._sums
        values = zip(self._surgery.tasks, sums.tolist(), strict=True)
        return {name: value / self._counts[name] for name, value in values if self._counts.get(name, 0)}


def _add(totals: list[Tensor], gradients: Sequence[Tensor | None]) -> None:
    for total, gradient in zip(totals, gradients, strict=True):
        if gradient is not None:
            total += gradient
