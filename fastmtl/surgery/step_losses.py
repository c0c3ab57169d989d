"""The losses of one optimizer step, summed over its micro-batches, and the user's loss function."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmtl.errors import UserError
from fastmtl.surgery.attach.attachment import Attachment
from fastmtl.surgery.differentiate import Term
from fastmtl.surgery.losses import Losses, check_counts, check_losses
from fastmtl.surgery.ranks.collectives import sum_over_ranks, world_size
from fastmtl.surgery.sinks.sink import Sink
from fastmtl.surgery.targets.protocol import Target


class Step:
    """The losses of a step, summed over its micro-batches, and the factors that make them means.

    counts: rows of each task in the whole step over all ranks; None: the rows of the only
    micro-batch, summed over ranks.
    task_weights: weight of each task's loss.
    constants: allow losses that depend on no trained parameter.
    stop: True if this rank requests the end of training after this step.
    check_rows: called with the number of rows of each task's loss.
    verifies: True until the first micro-batch of a step that is to be checked is compared with a
    pass per task.
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
        check_rows: Callable[[Mapping[str, int]], None] | None = None,
        verifies: bool = False,
    ) -> None:
        check_counts(counts or {}, tasks)
        self._check_rows, self.verifies = check_rows, verifies
        self._counts, self._constants = counts, constants
        self._tasks, self._task_weights = tasks, task_weights
        self.sums = torch.zeros(len(tasks) + 1, dtype=torch.float64, device=device)
        if stop:
            self.sums[-1] = 1

    def check(self, losses: Losses) -> None:
        """Check a micro-batch's losses, and count the rows of a step without `counts`."""
        check_losses(losses, self._tasks, constants=self._constants)
        if self._check_rows is not None:
            self._check_rows({name: rows for name, (_, rows) in losses.items()})
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

    def take(self, losses: Losses) -> None:
        """Check a micro-batch's losses and add them to `sums`."""
        self.check(losses)
        with torch.no_grad():
            absent = [self.sums.new_zeros(())] if len(losses) < len(self._tasks) else []
            self.sums[:-1] += torch.stack([losses[name][0] if name in losses else absent[0] for name in self._tasks])

    def factor(self, name: str) -> float:
        """Return the factor of a task's summed loss in the step's loss: its weight / its rows."""
        assert self._counts is not None
        return self._task_weights[self._tasks.index(name)] / max(self._counts.get(name, 0), 1)

    def terms(self, losses: Losses, scale: float = 1.0, only: Collection[str] | None = None) -> list[Term]:
        """Return (summed loss, its factor times `scale`) of each task in this micro-batch.

        The sum of the products is the micro-batch's part of the step's loss. only: tasks, if the
        losses of all others are to have the factor 0. Raises UserError if no loss can be
        differentiated.
        """
        found = [
            (loss, self.factor(name) * scale if only is None or name in only else 0.0)
            for name, (loss, _) in losses.items()
            if loss.requires_grad
        ]
        if not found:
            raise UserError(
                "no task has rows, and no loss depends on a parameter that is trained: without rows give the losses "
                "as zeros of the heads (the sum of a head's outputs times 0)"
            )
        return found

    def total(self, losses: Losses, only: Collection[str] | None = None) -> Tensor:
        """Return this micro-batch's part of the step's loss, a scalar. only: as for `terms`.

        Raises UserError if no loss can be differentiated.
        """
        self.terms(losses)
        factors = [self.factor(name) if only is None or name in only else 0.0 for name in losses]
        terms = zip(losses.values(), factors, strict=True)
        return torch.stack([loss * factor for (loss, _), factor in terms]).sum()

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
    """The user's loss_fn, called with the keyword arguments that it declares.

    attached: surgery inside the user's model, whose modules then take the sink without arguments.
    """

    def __init__(self, loss_fn: Callable[..., Any], target: Target, attached: Attachment | None = None) -> None:
        self._loss_fn, self._target, self._attached = loss_fn, target, attached
        declared = inspect.signature(loss_fn).parameters
        self._declares_sink = "task_grads" in declared
        self.takes_sink = self._declares_sink or attached is not None
        self._takes_model = "model" in declared
        if self._declares_sink and target.sharded:
            raise UserError(
                "loss_fn declares task_grads, but layers that are called with it do not know the parameters of "
                "fully_shard: leave task_grads out, and run `model` in a block `with surgery.rows(...)`"
            )

    def __call__(self, micro_batch: Any, sink: Sink, *, training_pass: bool = False, verifying: bool = False) -> Losses:
        """Return a micro-batch's losses.

        training_pass: True if the target's own backward follows, so `model` is the engine.
        verifying: True to check the outputs of modules that run once per task.
        """
        keywords: dict[str, Any] = {"task_grads": sink} if self._declares_sink else {}
        if self._attached is not None:
            self._attached.begin(sink, verifying=verifying)
        if self._takes_model:
            keywords["model"] = self._target.model(training_pass)
        with self._target.autocast(training_pass and self._takes_model):
            losses = self._loss_fn(micro_batch, **keywords)
        if self._attached is not None and not self._attached.used and not self._declares_sink:
            raise UserError("loss_fn: it must run the forward of `model` in a block `with surgery.rows(...)`")
        return losses
