"""The losses of one optimiser step, and what is told about it afterwards."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastmtl.errors import UserError
from fastmtl.surgery.reduce import sum_over_ranks
from fastmtl.surgery.targets import Target
from fastmtl.surgery.task_gradients import TaskGradients

Losses = Mapping[str, tuple[Tensor, int]]


@dataclass(frozen=True)
class SurgeryInfo:
    """By-products of a step, over all ranks.

    losses: mean loss of each task that had rows. cosines [T, T] between task gradients (NaN for an absent task),
    conflict_rate: share of task pairs with a negative cosine, task_norms [T], weights [T] of the gradients in the
    update, merged_norm: of the shared update; all None for `sum`, and where an fp16 overflow makes DeepSpeed back off.
    skipped: the task with a non-finite gradient; do not call step() then.
    """

    losses: dict[str, float]
    cosines: Tensor | None = None
    conflict_rate: float | None = None
    task_norms: Tensor | None = None
    weights: Tensor | None = None
    merged_norm: float | None = None
    skipped: str | None = None

    @classmethod
    def of_gramian(cls, losses: dict[str, float], gram: Tensor, weights: Tensor) -> SurgeryInfo:
        """From G [T, T] and the weights [T], both on the host."""
        norms = gram.diagonal().clamp(min=0).sqrt()
        cosines = gram / (norms[:, None] * norms[None, :])
        cosines[norms == 0, :] = cosines[:, norms == 0] = float("nan")
        upper = cosines[torch.triu(torch.ones_like(cosines, dtype=torch.bool), diagonal=1)]
        upper = upper[~upper.isnan()]
        return cls(
            losses=losses,
            cosines=cosines,
            conflict_rate=float((upper < 0).float().mean()) if len(upper) else 0.0,
            task_norms=norms,
            weights=weights,
            merged_norm=float((weights @ gram @ weights).clamp(min=0).sqrt()),
        )


class Step:
    """Calls loss_fn on the micro-batches and keeps the sums for the means.

    task_weights: fixed weight of each task's loss. sums: this rank's losses of each task so far, float64 [T].
    """

    def __init__(
        self,
        micro_batches: Sequence[Any],
        loss_fn: Callable[..., Losses],
        counts: Mapping[str, int] | None,
        *,
        tasks: list[str],
        task_weights: list[float],
        target: Target,
        sink: TaskGradients,
    ) -> None:
        if not micro_batches:
            raise UserError("micro_batches: a step needs at least one")
        if counts is None and len(micro_batches) > 1:
            raise UserError("counts: with several micro-batches give {task: rows in the whole step, over all ranks}")
        self.micro_batches = micro_batches
        self._loss_fn, self._counts = loss_fn, counts
        self._tasks, self._task_weights = tasks, task_weights
        self._target, self._sink = target, sink
        declared = inspect.signature(loss_fn).parameters
        self.takes_sink = "task_grads" in declared
        self._takes_model = "model" in declared
        self.sums = torch.zeros(len(tasks), dtype=torch.float64, device=target.device)

    def losses(self, index: int, *, training_pass: bool, count: bool = True) -> Losses:
        keywords: dict[str, Any] = {"task_grads": self._sink} if self.takes_sink else {}
        if self._takes_model:
            keywords["model"] = self._target.model(training_pass)
        if training_pass and self._takes_model:
            losses = self._loss_fn(self.micro_batches[index], **keywords)
        else:
            with self._target.autocast():
                losses = self._loss_fn(self.micro_batches[index], **keywords)
        self._check(losses)
        if count:
            for t, name in enumerate(self._tasks):
                if name in losses:
                    self.sums[t] += losses[name][0].detach()
        return losses

    def _check(self, losses: Losses) -> None:
        unknown = set(losses) - set(self._tasks)
        if unknown:
            raise UserError(f"loss_fn gave losses of {', '.join(sorted(unknown))}, tasks are {', '.join(self._tasks)}")
        if not losses:
            raise UserError("loss_fn gave no loss: give every task that the model ran, without rows a zero of its head")
        if self._counts is None:
            local = [losses[name][1] if name in losses else 0 for name in self._tasks]
            total = sum_over_ranks(torch.tensor(local, device=self._target.device))
            self._counts = dict(zip(self._tasks, total.tolist(), strict=True))
        for name, (_, rows) in losses.items():
            if rows > self._counts.get(name, 0):
                raise UserError(
                    f"counts: task {name} has {rows} rows in one micro-batch, counts gives it "
                    f"{self._counts.get(name, 0)} in the whole step over all ranks"
                )

    def scaled(self, name: str, losses: Losses) -> Tensor:
        """This micro-batch's part of the task's weighted mean loss."""
        assert self._counts is not None
        weight = self._task_weights[self._tasks.index(name)]
        return losses[name][0] * (weight / max(self._counts.get(name, 0), 1))

    def total(self, losses: Losses) -> Tensor:
        return torch.stack([self.scaled(name, losses) for name in losses]).sum()

    def mean_losses(self, sums: Sequence[float]) -> dict[str, float]:
        """Unweighted mean loss of each task, from the sums over all ranks."""
        assert self._counts is not None
        values = zip(self._tasks, sums, strict=True)
        return {name: value / self._counts[name] for name, value in values if self._counts.get(name, 0)}
