"""The losses of one optimizer step, and its report."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmtl.errors import UserError
from fastmtl.surgery.differentiate import Term
from fastmtl.surgery.losses import Losses, check_counts, check_losses
from fastmtl.surgery.ranks.collectives import sum_over_ranks, world_size
from fastmtl.surgery.sinks.sink import Sink
from fastmtl.surgery.stopwatch import Stopwatch
from fastmtl.surgery.targets.protocol import Target


@dataclass(frozen=True)
class SurgeryInfo:
    """Report of a step, over all ranks.

    losses: mean loss of each task that had rows.
    cosines: [T, T], between task gradients; NaN for an absent task.
    conflict_rate: share of the task pairs with a negative cosine.
    task_norms: [T], norms of the task gradients.
    weights: [T], of the task gradients in the update.
    merged_norm: norm of the shared update, before clipping.
    own_norm: norm of the gradients of parameters that belong to one task, before clipping.
    total_norm: norm of own and shared gradients together, before clipping; for `sum`, of the whole
    gradient.
    skipped: the task, or the parameter of a single task, whose gradient is not finite; do not call
    step() then.
    stop: True if any rank requests the end of training after this step.
    nbytes: size of J on this rank, or of the buffers that replace it.
    stopwatch: measures the time that surgery added to the step; see `seconds`.

    cosines, conflict_rate, task_norms, weights and merged_norm are None for `sum`, and where an
    fp16 overflow makes DeepSpeed reduce its loss scale. own_norm and total_norm are None without
    `max_norm`. With `scope="tensor"` weights is None, since each tensor has its own. With
    `reduce="local"` each rank has its own, so weights and merged_norm are None, and the other
    fields describe the mean of the ranks' Gramians.
    """

    losses: dict[str, float]
    cosines: Tensor | None = None
    conflict_rate: float | None = None
    task_norms: Tensor | None = None
    weights: Tensor | None = None
    merged_norm: float | None = None
    own_norm: float | None = None
    total_norm: float | None = None
    skipped: str | None = None
    stop: bool = False
    nbytes: int = 0
    stopwatch: Stopwatch | None = None

    @property
    def seconds(self) -> float:
        """Seconds that surgery added on this rank: Gramian, reductions, weights and merging.

        With `replay`, the first pass counts too. 0 with `scope="tensor"`, where surgery runs inside
        backward. Waits for the device.
        """
        return 0.0 if self.stopwatch is None else self.stopwatch.seconds()

    @classmethod
    def of_gramian(
        cls,
        losses: dict[str, float],
        gram: np.ndarray,
        weights: np.ndarray | None,
        merged_square: float | None,
        **more: Any,
    ) -> SurgeryInfo:
        """Return the report for G [T, T] and the weights [T], both float32.

        merged_square: squared norm of the shared update. The computation is in numpy: torch would
        call a hundred operators for a few numbers.
        """
        norms = np.sqrt(gram.diagonal().clip(min=0))
        with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
            cosines = gram / np.outer(norms, norms)
        cosines[norms == 0, :] = cosines[:, norms == 0] = np.nan
        upper = cosines[np.triu_indices_from(cosines, k=1)]
        upper = upper[~np.isnan(upper)]
        return cls(
            losses=losses,
            cosines=torch.from_numpy(cosines),
            conflict_rate=float((upper < 0).astype(np.float32).mean()) if len(upper) else 0.0,
            task_norms=torch.from_numpy(norms),
            weights=None if weights is None else torch.from_numpy(weights),
            merged_norm=None if merged_square is None else max(merged_square, 0.0) ** 0.5,
            **more,
        )


class Step:
    """Losses of a step's micro-batches, summed, and their scale to means.

    counts: rows of each task in the whole step over all ranks; None: the rows of the only
    micro-batch, summed over ranks.
    task_weights: weight of each task's loss.
    constants: as in `check_losses`.
    stop: True if this rank requests the end of training after this step.
    sums: float64 [T + 1], this rank's sum of losses per task so far; the last element is 1 for a
    stop request.
    """

    def __init__(
        self,
        counts: Mapping[str, int] | None,
        *,
        tasks: list[str],
        task_weights: list[float],
        device: torch.device,
        constants: bool = False,
        stop: bool = False,
    ) -> None:
        check_counts(counts or {}, tasks)
        self._counts, self._constants = counts, constants
        self._tasks, self._task_weights = tasks, task_weights
        self.sums = torch.zeros(len(tasks) + 1, dtype=torch.float64, device=device)
        if stop:
            self.sums[-1] = 1

    def take(self, losses: Losses) -> None:
        """Check a micro-batch's losses and add them to `sums`."""
        check_losses(losses, self._tasks, constants=self._constants)
        if self._counts is None:
            rows = [losses[name][1] if name in losses else 0 for name in self._tasks]
            if world_size() > 1:  # losses are divided by the counts before backward, so all ranks wait here
                rows = sum_over_ranks(torch.tensor(rows, device=self.sums.device)).tolist()
            self._counts = dict(zip(self._tasks, rows, strict=True))
        for name, (_, here) in losses.items():
            if here > self._counts.get(name, 0):
                raise UserError(
                    f"counts: task {name} has {here} rows in one micro-batch, counts gives it "
                    f"{self._counts.get(name, 0)} in the whole step over all ranks"
                )
        with torch.no_grad():
            absent = [self.sums.new_zeros(())] if len(losses) < len(self._tasks) else []
            self.sums[:-1] += torch.stack([losses[name][0] if name in losses else absent[0] for name in self._tasks])

    def factor(self, name: str) -> float:
        """Return the factor from the sum of a task's losses to its part of the step's weighted mean
        loss.
        """
        assert self._counts is not None
        return self._task_weights[self._tasks.index(name)] / max(self._counts.get(name, 0), 1)

    def terms(self, losses: Losses, scale: float = 1.0) -> list[Term]:
        """Return the terms of this micro-batch's part of the step's loss, times `scale`.

        Raises UserError if no loss can be differentiated.
        """
        found = [(loss, self.factor(name) * scale) for name, (loss, _) in losses.items() if loss.requires_grad]
        if not found:
            raise UserError(
                "no task has rows, and no loss depends on a parameter that is trained: without rows give the losses "
                "as zeros of the heads (the sum of a head's outputs times 0)"
            )
        return found

    def total(self, losses: Losses) -> Tensor:
        """Return this micro-batch's part of the step's loss.

        Raises UserError if no loss can be differentiated.
        """
        self.terms(losses)
        return torch.stack([loss * self.factor(name) for name, (loss, _) in losses.items()]).sum()

    def summarize(self, sums: Sequence[float]) -> tuple[dict[str, float], bool]:
        """Return each task's unweighted mean loss, and True if any rank requests the end of
        training.

        sums: the attribute `sums`, summed over ranks.
        """
        assert self._counts is not None
        *losses, stop_requests = sums
        values = zip(self._tasks, losses, strict=True)
        return {
            name: value / self._counts[name] for name, value in values if self._counts.get(name, 0)
        }, stop_requests > 0


class LossFunction:
    """The user's loss_fn, called with the keyword arguments that it declares."""

    def __init__(self, loss_fn: Callable[..., Losses], target: Target) -> None:
        self._loss_fn, self._target = loss_fn, target
        declared = inspect.signature(loss_fn).parameters
        self.takes_sink = "task_grads" in declared
        self._takes_model = "model" in declared

    def __call__(self, micro_batch: Any, sink: Sink, *, training_pass: bool = False) -> Losses:
        """Return a micro-batch's losses.

        training_pass: True if the target's own backward follows, so `model` is the engine.
        """
        keywords: dict[str, Any] = {"task_grads": sink} if self.takes_sink else {}
        if self._takes_model:
            keywords["model"] = self._target.model(training_pass)
        with self._target.autocast(training_pass and self._takes_model):
            return self._loss_fn(micro_batch, **keywords)
