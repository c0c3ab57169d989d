"""GradientSurgery for loops that give one micro-batch at a time, each with a column of tasks."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl.errors import UserError, listed, quoted
from fastmtl.surgery.attach.reading import read_rows
from fastmtl.surgery.gradient_surgery import GradientSurgery
from fastmtl.surgery.info import SurgeryInfo
from fastmtl.surgery.losses import Losses, check_counts, check_losses
from fastmtl.surgery.ranks.collectives import sum_over_ranks, world_size
from fastmtl.surgery.targets.ddp import without_reduction

LossesOf = Callable[[Any, Any], Losses]
_WRAPPERS = ("zero_optimization_stage", "_forward_module")  # attributes of DeepSpeed's and Fabric's wrappers
CountRows = Callable[[Any], Mapping[str, int]]


@dataclasses.dataclass(frozen=True)
class _MicroBatch:
    """A micro-batch. tasks: its task column, on the host. counts: rows of each task's loss."""

    inputs: Any
    tasks: Any
    counts: Mapping[str, int]


class LoopSurgery:
    """Surgery on the micro-batches that a loop adds until its optimizer step.

    Args:
        target: DeepSpeed engine or torch optimizer.
        model: model to call, as the library has wrapped it; the engine under DeepSpeed.
        method, tasks: as in GradientSurgery.
        trunk: the shared part of `model` or the name of that module ("" is the whole model), whose
            modules pass the gradients of all tasks in one backward pass. None: one pass per task.
        losses_of: losses_of(model, batch) -> {task: (sum of the rows' losses, number of rows)}.
            `model` is the wrapped model, or the module of the engine in passes without DeepSpeed's
            own backward.
        task_column: key of a batch with the tasks of its rows, in a form of GradientSurgery.rows:
            numbers in `tasks`, int64 [B], names, or bool [B, T] for rows of several tasks.
        count_rows: count_rows(batch) -> {task: number of rows of its loss}; default: the rows of
            the task column. Give it if a loss counts something else, such as tokens.
        options: further arguments of GradientSurgery.

    Raises:
        UserError: an invalid argument; later, a batch or losses that do not fit it.
    """

    def __init__(
        self,
        target: Any,
        model: Any,
        method: str = "pcgrad",
        *,
        tasks: Sequence[str],
        trunk: nn.Module | str | None,
        losses_of: LossesOf,
        task_column: str = "task",
        count_rows: CountRows | None = None,
        **options: Any,
    ) -> None:
        check_model(model)
        for name, function in (("losses_of", losses_of), ("count_rows", count_rows)):
            if function is not None and not callable(function):
                raise UserError(f"{name} is of type {type(function).__name__}: give a function")
        self._model, self._losses_of, self._column = model, losses_of, task_column
        self._count_rows = count_rows
        module = find_trunk(model, trunk)
        self._has_trunk = module is not None
        self.surgery = GradientSurgery(target, method, tasks=tasks, model=module, **options)
        self._waiting: list[_MicroBatch] = []

    def add(self, batch: Any) -> None:
        """Keep a micro-batch for `run`."""
        try:
            column = batch[self._column]
        except (KeyError, IndexError, TypeError):
            columns = f" (its columns are {listed(map(str, batch))})" if isinstance(batch, Mapping) else ""
            raise UserError(
                f"task_column: a batch has no {quoted(self._column)}{columns}: give the name of the column with each "
                "row's task, as the collator returns it"
            ) from None
        tasks = column.cpu() if isinstance(column, Tensor) else column
        rows = read_rows(tasks, self.surgery.tasks)
        if self._count_rows is not None:
            counts = self._count_rows(batch)
            check_counts(counts, self.surgery.tasks, "count_rows")
        else:
            rows_of = Counter(task for row in rows for task in row)
            counts = {name: rows_of[number] for number, name in enumerate(self.surgery.tasks)}
        self._waiting.append(_MicroBatch(batch, tasks, counts))

    def run(self) -> SurgeryInfo:
        """Run forward and backward of all micro-batches since the last `run`; return the report.

        Raises UserError if losses do not fit the rows of their micro-batch.
        """
        batches, self._waiting = self._waiting, []
        return self.surgery.run(batches, self._losses, self._counts(batches))

    def detach(self) -> None:
        """Undo the changes to the model, which then runs as before surgery."""
        self.surgery.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of surgery for a checkpoint: numbers, strings and lists."""
        return self.surgery.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.surgery.load_state_dict(state)

    def _counts(self, batches: Sequence[_MicroBatch]) -> dict[str, int]:
        """Return the rows of each task over all micro-batches and ranks."""
        names = self.surgery.tasks
        rows = [sum(batch.counts.get(name, 0) for batch in batches) for name in names]
        if world_size() > 1:
            device = next(unwrapped(self._model).parameters()).device
            rows = sum_over_ranks(torch.tensor(rows, device=device)).tolist()
        return dict(zip(names, rows, strict=True))

    def _losses(self, batch: _MicroBatch, model: Any) -> Losses:
        model = self._model if model is None else model
        with without_reduction(model), self.surgery.rows(batch.tasks) if self._has_trunk else nullcontext():
            losses = self._losses_of(model, batch.inputs)
        check_losses(losses, self.surgery.tasks, constants=True)
        check_rows(losses, batch.counts)
        return losses


def check_model(model: Any) -> None:
    """Raise UserError for a model to call that is no module, such as an optimizer."""
    if not isinstance(unwrapped(model), nn.Module):
        raise UserError(f"model is of type {type(model).__name__}: give the model to call, a torch.nn.Module")


def check_rows(losses: Losses, counts: Mapping[str, int]) -> None:
    """Raise UserError if the losses of a micro-batch have other numbers of rows than `counts`.

    Each loss is divided by the rows in `counts`, summed over the step.
    """
    for name, rows in counts.items():
        if rows and name not in losses:
            raise UserError(f"losses_of: no loss of task {name}, which has {rows} rows in this micro-batch")
    for name, (_, rows) in losses.items():
        if rows != counts.get(name, 0):
            raise UserError(
                f"losses_of: the loss of task {name} has {rows} rows, but its micro-batch has {counts.get(name, 0)}: "
                "give count_rows if losses count something else than rows of the task column, such as tokens"
            )


def find_trunk(model: Any, trunk: nn.Module | str | None) -> nn.Module | None:
    """Return the trunk. trunk: the module itself, or its name in `model`, which may be wrapped."""
    if not isinstance(trunk, str):
        return trunk
    try:
        return unwrapped(model).get_submodule(trunk)
    except AttributeError:
        raise UserError(
            f"trunk: the model has no module {quoted(trunk)}: give the name of its shared part as in "
            'model.named_modules(), or "" for the whole model'
        ) from None


def unwrapped(model: Any) -> nn.Module:
    """Return the user's model in the wrappers of DistributedDataParallel, DeepSpeed and Fabric."""
    while isinstance(model, nn.parallel.DistributedDataParallel) or any(hasattr(model, name) for name in _WRAPPERS):
        model = model.module
    return model
