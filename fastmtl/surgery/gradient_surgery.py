"""Gradient surgery for a training loop: `run` takes the micro-batches of one step and leaves one merged gradient.

T tasks. Loss of task t = weight_t * (sum of its losses over the whole step) / (its rows in the whole step), over
micro-batches and ranks together, so the same rows give the same step however they are spread. J holds the
T gradients of the shared parameters.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl.errors import TrainingError, UserError
from fastmtl.surgery.methods import Reduction, draw_order, find_method
from fastmtl.surgery.random_state import RandomState
from fastmtl.surgery.reduce import gather_rows, scatter_columns, sum_over_ranks
from fastmtl.surgery.step import Losses, Step, SurgeryInfo
from fastmtl.surgery.targets import find_target
from fastmtl.surgery.task_gradients import TaskGradients

log = logging.getLogger(__name__)

MAX_SKIPPED = 5


class GradientSurgery:
    """`sum` or a gradient method on a DeepSpeed engine or a torch optimiser.

    target: the engine (ZeRO 0 to 3) or, in one process, the optimiser. method: "sum", "pcgrad" or "gradvac".
    tasks: their names, in the order of segments and rows of J.
    shared: the parameters that surgery is about; the others get their own gradient. Default: all of the target.
    sparse: shared embedding tables whose gradient is kept as compact rows.
    storage: "stacked" keeps J; "replay" keeps only G and runs forward and backward a second time; "auto" takes stacked
    where the target can (ZeRO 0 to 2 without offload).
    dtype: of J in `stacked`; bfloat16 halves it and rounds every task gradient to 8 bits.
    task_weights: fixed weight of each task's loss, applied before the Gramian. reduction: of the modified gradients,
    "sum" (the paper) or "mean".
    seed: of the random order in which tasks meet, with the step's number.
    Raises UserError for an unknown name, and for a combination that cannot do what it promises.
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
        dtype: torch.dtype = torch.float32,
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
            raise UserError(f"storage must be auto, stacked or replay, got {storage!r}")
        if storage == "stacked" and not self._target.stacks:
            raise UserError(
                "storage='stacked' needs every gradient at hand, which ZeRO 3 and offload do not give: "
                "use storage='replay'"
            )
        if dtype not in (torch.float32, torch.bfloat16):
            raise UserError(f"dtype must be torch.float32 or torch.bfloat16, got {dtype}")
        self.storage = storage if storage != "auto" else ("stacked" if self._target.stacks else "replay")
        self._weights = [float((task_weights or {}).get(name, 1.0)) for name in self.tasks]
        self._reduction, self._seed = reduction, seed
        self._sink = TaskGradients(
            self._shared, len(self.tasks), sparse=sparse, dtype=dtype, scatter=scatter_columns, gather_rows=gather_rows
        )
        self._step = self._skipped = self._skipped_in_a_row = 0
        self._told = False

    def run(
        self, micro_batches: Sequence[Any], loss_fn: Callable[..., Losses], counts: Mapping[str, int] | None = None
    ) -> SurgeryInfo:
        """Forward and backward of one optimiser step; then call `engine.step()` (or `optimizer.step()`) unless
        `skipped`.

        loss_fn(micro_batch, ...) -> {task: (sum of the rows' losses, number of rows)}. It is given by keyword what it
        declares: `model`, what to call (the engine or its module, by pass; needed for replay under DeepSpeed), and
        `task_grads`, the sink, for a model whose layers write into it. Without `task_grads` there is one backward per
        task.
        counts: rows of each task in the whole step over all ranks; needed with several micro-batches, else counted.
        Raises UserError where the losses do not fit `tasks` or `counts`, or a shared parameter's gradient goes past
        the sink; TrainingError after five skipped steps in a row.
        """
        step = Step(
            micro_batches,
            loss_fn,
            counts,
            tasks=self.tasks,
            task_weights=self._weights,
            target=self._target,
            sink=self._sink,
        )
        self._step += 1
        if self._method is None or not self._shared:
            return self._sum(step)
        if not step.takes_sink and not self._told:
            self._told = True
            log.warning("loss_fn takes no task_grads: one backward pass per task (see docs/surgery.md)")
        return self._replay(step) if self.storage == "replay" else self._stacked(step)

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready: what the next step's order, the skipped steps and the method depend on."""
        method = {} if self._method is None else self._method.state_dict()
        return {
            "seed": self._seed,
            "step": self._step,
            "skipped": self._skipped,
            "skipped_in_a_row": self._skipped_in_a_row,
            "method": method,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._seed, self._step = state["seed"], state["step"]
        self._skipped, self._skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
        if self._method is not None:
            self._method.load_state_dict(state["method"])

    def _sum(self, step: Step) -> SurgeryInfo:
        for index in range(len(step.micro_batches)):
            losses = step.losses(index, training_pass=True)
            self._target.backward(step.total(losses), last=index == len(step.micro_batches) - 1)
        return SurgeryInfo(losses=step.mean_losses(sum_over_ranks(step.sums).tolist()))

    def _stacked(self, step: Step) -> SurgeryInfo:
        scale = self._target.loss_scale()
        self._sink.clear()
        own = [torch.zeros_like(p, dtype=torch.float32) for p in self._own]
        for index in range(len(step.micro_batches)):
            with self._sink.armed("stack", self._target.device):
                losses = step.losses(index, training_pass=False)
                if step.takes_sink:
                    _add(own, self._one_pass(step.total(losses) * scale))
                else:
                    self._one_by_one(step, losses, scale, own)
        info, weights = self._solve(step, scale)
        if info.skipped is None:
            factor = self._target.factor / scale
            merged = self._sink.combine(weights * factor)
            merged.update({id(p): gradient.mul_(factor) for p, gradient in zip(self._own, own, strict=True)})
            self._target.hand_over(merged)
        return info

    def _one_pass(self, loss: Tensor) -> Sequence[Tensor | None]:
        """All task gradients into the sink; returns those of the tasks' own parameters."""
        # Shared parameters are asked for only to see that autograd has nothing for them: layers that write into the
        # sink give None, any other op's gradient would be lost.
        anchor, *rest = torch.autograd.grad(loss, [self._sink.anchor, *self._own, *self._shared], allow_unused=True)
        self._check_wiring(anchor, rest[len(self._own) :])
        return rest[: len(self._own)]

    def _check_wiring(self, anchor: Tensor | None, shared: Sequence[Tensor | None]) -> None:
        if anchor is None:
            raise UserError(
                "loss_fn takes task_grads but the model does not use it: pass it to the layers, embedding included, "
                "or leave it out for one backward pass per task"
            )
        for parameter, gradient in zip(self._shared, shared, strict=True):
            if gradient is not None:
                raise UserError(
                    f"shared parameter {self._target.names[id(parameter)]} is used by an op that does not write into "
                    "task_grads: use the ops of fastmtl.surgery.functional for it, or leave it out of `shared`"
                )

    def _one_by_one(self, step: Step, losses: Losses, scale: float, own: list[Tensor]) -> None:
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

    def _replay(self, step: Step) -> SurgeryInfo:
        if not step.takes_sink:
            raise UserError(
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
                self._sink.forward_done()
                anchor, *shared = torch.autograd.grad(
                    step.total(losses) * scale, [self._sink.anchor, *self._shared], allow_unused=True
                )
                self._check_wiring(anchor, shared)
        after = RandomState.capture(self._target.device)
        info, weights = self._solve(step, scale)
        self._sink.clear()
        if info.skipped is not None:
            return info
        for index, state in enumerate(states):
            state.restore()  # the same dropout masks as in the first pass
            with self._sink.armed("weighted", self._target.device, weights=weights):
                losses = step.losses(index, training_pass=True, count=False)
                self._target.backward(step.total(losses), last=index == len(states) - 1)
        after.restore()
        return info

    def _solve(self, step: Step, scale: float) -> tuple[SurgeryInfo, Tensor]:
        """G over all ranks, the weights, and what they tell: one small reduction, one wait for the device."""
        assert self._method is not None
        num_tasks = len(self.tasks)
        partial = sum_over_ranks(torch.cat([self._sink.gramian().flatten().double(), step.sums]))
        gram = partial[: num_tasks**2].float().view(num_tasks, num_tasks) + self._sink.sparse_gramian()
        gram = gram / scale**2
        order = draw_order(num_tasks, self._seed, self._step).to(gram.device)
        weights = self._method.weights(gram, order, self._reduction)
        on_host = torch.cat([gram.flatten().double(), weights.double(), partial[num_tasks**2 :]]).cpu()
        host, host_weights, sums = on_host.split([num_tasks**2, num_tasks, num_tasks])
        host = host.view(num_tasks, num_tasks).float()
        losses = step.mean_losses(sums.tolist())
        bad = [name for t, name in enumerate(self.tasks) if not torch.isfinite(host[t, t])]
        if not bad:
            self._skipped_in_a_row = 0
            return SurgeryInfo.of_gramian(losses, host, host_weights.float()), weights
        if self._target.backs_off():  # it has to see the overflow in the gradients
            return SurgeryInfo(losses=losses), torch.full_like(weights, float("nan"))
        return self._skip(bad[0], losses), weights

    def _skip(self, task: str, losses: dict[str, float]) -> SurgeryInfo:
        self._skipped += 1
        self._skipped_in_a_row += 1
        log.warning("step %d skipped: the gradient of task %s is not finite", self._step, task)
        if self._skipped_in_a_row == MAX_SKIPPED:
            raise TrainingError(
                f"the gradient of task {task} was not finite in {MAX_SKIPPED} steps in a row: lower optimizer.lr, "
                "lengthen schedule.warmup, or look for broken rows of that task"
            )
        return SurgeryInfo(losses=losses, skipped=task)


def _add(totals: list[Tensor], gradients: Sequence[Tensor | None]) -> None:
    for total, gradient in zip(totals, gradients, strict=True):
        if gradient is not None:
            total += gradient
